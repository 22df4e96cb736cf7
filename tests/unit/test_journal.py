"""The journal: a kill in the middle of a line costs that line and no other; a replay asks for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.journal import Journal, key


def forbidden() -> Any:
    raise AssertionError("asked again for what is in the journal")


def test_what_is_done_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "deep/journal.jsonl"
    values = [Journal(path).once(f"k{n}", lambda n=n: [{"n": n, "text": "é\u2028\n"}]) for n in range(3)]
    replay = Journal(path)
    assert [replay.once(f"k{n}", forbidden) for n in range(3)] == values
    assert replay.replayed == 3
    assert replay.once("k3", lambda: None) is None and Journal(path).once("k3", forbidden) is None


def test_an_error_journals_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(AssertionError):
        journal.once("k", forbidden)
    assert Journal(tmp_path / "journal.jsonl").once("k", lambda: 5) == 5


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_a_line_cut_off_is_dropped_and_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    for n in range(3):
        Journal(path).once(f"k{n}", lambda n=n: [f"a value of some length {n}"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(path)
    assert [journal.once(f"k{n}", forbidden) for n in (0, 1)]
    assert journal.once("k2", lambda: ["a value of some length 2"]) == ["a value of some length 2"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "tail", [b"\0" * 64, b"\0" * 64 + b"\n", b"{}\n", b"[1]\n", b'{"key": "k9"}\n', b"\xff\n"]
)
def test_rubbish_at_the_end_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).once("k0", lambda: 0)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal = Journal(path)
    assert path.read_bytes() == whole and journal.once("k0", forbidden) == 0


def test_a_killed_process_keeps_what_it_finished(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys; from models.journal import Journal; j = Journal(sys.argv[1])\n"
        "[j.once(f'k{n}', lambda: n if n < 2 else os.kill(os.getpid(), signal.SIGKILL)) for n in range(9)]"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    journal = Journal(path)
    assert [journal.once("k0", forbidden), journal.once("k1", forbidden)] == [0, 1]
    assert journal.once("k2", lambda: 2) == 2


def test_a_key_follows_from_all_that_is_asked() -> None:
    parts = [["q1", "q2"], 4, {"temperature": 0.7, "top_p": 0.9}, 17]
    assert key(*parts) == key(*[["q1", "q2"], 4, {"top_p": 0.9, "temperature": 0.7}, 17])
    changed = [[["q2", "q1"], *parts[1:]], [*parts[:3], 18], [parts[0], 5, *parts[2:]], parts[:3]]
    assert len({key(*parts), *(key(*other) for other in changed)}) == 5
