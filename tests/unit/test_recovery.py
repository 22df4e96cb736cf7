"""What a kill leaves in DVC's files, and output that is logged as plain lines."""

from __future__ import annotations

import io
import json
from pathlib import Path

from flows import recovery
from flows.terminal import LogFile, WithoutHints

LOCK = "schema: '2.0'\nstages:\n  a:\n    cmd: true\n"


def test_entries_of_dead_processes_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True)
    dead = {"pid": 2**22 + 1, "cmd": "dvc repro"}
    path.write_text(json.dumps({"write": {"a": dead}, "read": {"b": [dead]}}))
    assert recovery.repair_rwlock(tmp_path)
    assert json.loads(path.read_text()) == {}
    assert recovery.repair_rwlock(tmp_path) == []
    path.write_text('{"write": {"a"')
    assert recovery.repair_rwlock(tmp_path) and not path.exists()


def test_lock_file_cut_in_half_is_put_back(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    (tmp_path / ".work").mkdir()
    lock.write_text(LOCK)
    recovery.keep_lock_file(tmp_path)
    assert recovery.restore_lock_file(tmp_path) == []
    for broken in ("", "schema: '2.0'\nstages:\n  a: {cmd", "stages:\n"):
        lock.write_text(broken)
        recovery.keep_lock_file(tmp_path)  # a broken file is never kept
        assert recovery.restore_lock_file(tmp_path) and lock.read_text() == LOCK


def test_log_holds_plain_lines() -> None:
    file = io.BytesIO()
    log = LogFile(file)
    for data in (b"\x1b[31mred\x1b[0m\n", b"1%\r2%", b"\r3%\r100%\n", b"end\r\n", b"no newline"):
        log.write(data)
    log.close()
    assert file.getvalue().decode().splitlines() == ["red", "100%", "end", "no newline"]


def test_hints_of_dvc_are_not_shown() -> None:
    text = (
        b"Running stage 'a':\n\n10%\r20%\nUpdating lock file 'dvc.lock'\n\n"
        b"To track the changes with git, run:\n\n\tgit add dvc.lock\n\n"
        b"Use `dvc push` to send your updates to remote storage.\nTotal 5\n"
    )
    for size in (1, 7, len(text)):
        wanted = WithoutHints()
        shown = b"".join(wanted.feed(text[i : i + size]) for i in range(0, len(text), size))
        assert shown == b"Running stage 'a':\n\n10%\r20%\nTotal 5\n"
