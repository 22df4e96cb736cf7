"""The journal of steps: what was durable is there after a kill at any moment, once, and ends as one file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest

from models.journal import PACE_S, Journal, JournalError, payload_hash, step_key

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3000
NOISE = random.Random(1).randbytes(700)
BEGIN = """
import os, sys, time, resource
from models.journal import Journal, JournalError, payload_hash, step_key
journal = Journal(sys.argv[1])
def say(*words): print(*words, flush=True)
"""
WORK = """
for n in range({steps}):
    if journal.get(key(n)) is None:
        journal.put(key(n), value(n))
        if n % 40 == 0:
            journal.flush()
            say(n + 1)
journal.flush()
"""


def key(n: int) -> str:
    return step_key(f"q{n * 7919 % 1009}", n % 4, n // 4, payload_hash(n))


def value(n: int) -> dict[str, object]:
    return {"title": f"Step {n}", "content": "word " * (n * 31 % 200), "tokens": n}


@contextmanager
def process(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process with the journal open; killed at the end if it still runs."""
    command = [sys.executable, "-c", BEGIN + getsource(key) + getsource(value) + code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return child.stdout.readline().strip()


def finished(path: Path, code: str) -> str:
    """All that the process says; it must end well."""
    with process(path, code) as child:
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        return said


def known(path: Path, steps: int = STEPS) -> list[int]:
    with Journal(path) as journal:
        found = [(n, journal.get(key(n))) for n in range(steps)]
    assert all(got in (None, value(n)) for n, got in found)
    return [n for n, got in found if got is not None]


def fill(path: Path, numbers: range | list[int]) -> None:
    with Journal(path) as journal:
        for n in numbers:
            journal.put(key(n), value(n))


def compacted(path: Path) -> bytes:
    with Journal(path) as journal:
        return journal.compact().read_bytes()


def test_what_was_put_is_known_at_once_and_to_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/journal.jsonl"
    values: list[dict[str, Any]] = [
        {"text": 'é\u2028\n\0"}, "value": {'},
        {"half": "\ud83d é"},
        {"b": [1, None, 2.5], "a": {}},
        {},
    ]
    with Journal(path) as journal:
        for n, content in enumerate(values):
            journal.put(f"k{n}", content)
            assert journal.get(f"k{n}") == content
        assert journal.get("k9") is None
    assert (journal.written, journal.replayed) == (4, 4)
    with Journal(path) as journal:
        again = [journal.get(f"k{n}") for n in range(5)]
        assert again == [*values, None] and list(again[2] or ()) == ["b", "a"]
    assert (journal.written, journal.replayed) == (0, 4)


def test_a_step_is_known_at_every_moment_on_its_way_to_the_disk(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        for n in range(STEPS):
            journal.put(key(n), value(n))
            assert journal.get(key(n)) and journal.get(key(n * 17 % (n + 1)))


def test_the_first_value_of_a_key_stays(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        with busy_disk(path):
            for n in range(3):  # waiting, then being written
                journal.put("k", {"n": n})
                assert journal.get("k") == {"n": 0}
                time.sleep(0.03)
        for n in range(3, 9):  # on disk
            journal.put("k", {"n": n})
            assert journal.get("k") == {"n": 0}
            if n % 2:
                journal.flush()
        journal.flush()
        assert journal.written == 1
        journal.compact()
    with Journal(path) as journal:
        journal.put("k", {"n": 9})
        assert journal.get("k") == {"n": 0}
        assert journal.compact().read_text() == '{"key": "k", "value": {"n": 0}}\n'
    assert journal.written == 0


def test_all_steps_of_a_record_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    records = ["q", "q1", "q10", "q1é", "r/2", "z"]
    with Journal(path) as journal:
        for number, record in enumerate(records):
            for sample in range(3):
                journal.put(f"{record}/{sample}/0:ab", {"n": number})
        waiting = {record: journal.steps_of(record) for record in records}
        journal.flush()
        assert {record: journal.steps_of(record) for record in records} == waiting
        journal.compact()
    with Journal(path) as journal:
        assert {record: journal.steps_of(record) for record in records} == waiting
        journal.put("q1/0/0:ab", {"n": 99})
        journal.put("q1/0/1:cd", {"n": 5})
        assert journal.steps_of("q1") == {**waiting["q1"], "q1/0/1:cd": {"n": 5}}
        assert journal.steps_of("q11") == {}
    expected = {f"q1/{sample}/0:ab": {"n": 1} for sample in range(3)}
    assert waiting["q1"] == expected


def test_flush_waits_for_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal, ThreadPoolExecutor(1) as thread:
        with busy_disk(path):
            for n in range(3):
                journal.put(f"k{n}", {})
                time.sleep(0.03)
            flushed = thread.submit(journal.flush)
            time.sleep(0.1)
            assert not flushed.done() and journal.written == 0
        flushed.result()
        assert journal.written == 3


@contextmanager
def busy_disk(path: Path) -> Iterator[None]:
    """The journal's database is locked: what is put is not written."""
    with closing(sqlite3.connect(f"{path}.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_killed_again_and_again_it_loses_nothing_durable_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path, chance = tmp_path / "journal.jsonl", random.Random(4)
    kills = before = 0
    while kills < 10 and before < STEPS:
        with process(path, WORK.format(steps=STEPS)) as child:
            for _ in range(chance.randrange(1, 5)):
                durable = int(line(child) or STEPS)
            time.sleep(chance.uniform(0, 0.03))
            child.kill()
        kills += 1
        found = known(path)
        assert len(found) >= max(durable, before)
        assert found == list(range(len(found)))  # durable in the order they were put
        before = len(found)
    assert kills >= 5
    finished(path, WORK.format(steps=STEPS))
    fill(tmp_path / "whole/journal.jsonl", range(STEPS))
    assert compacted(path) == compacted(tmp_path / "whole/journal.jsonl")


def test_what_was_put_is_durable_moments_later_without_a_flush(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with process(
        path,
        "for n in range(50): journal.put(key(n), value(n)); time.sleep(0.001)\nsay('put'); time.sleep(60)",
    ) as child:
        assert line(child) == "put"
        time.sleep(0.3)
        child.kill()
    assert known(path, 60) == list(range(50))


def test_what_was_put_is_durable_when_a_process_ends_without_closing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    finished(path, "[journal.put(key(n), value(n)) for n in range(50)]")
    assert known(path, 60) == list(range(50)) and not Path(f"{path}.lock").exists()


def test_commits_and_the_compacted_file_wait_for_the_disk_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, bool] = {}  # no kill shows this, only a power cut
    database = tmp_path / "journal.jsonl.db"
    monkeypatch.setattr(os, "fsync", lambda file: synced.update({os.fstat(file).st_ino: database.exists()}))
    with Journal(tmp_path / "journal.jsonl") as journal:
        for name, setting in (("synchronous", 2), ("journal_mode", "wal")):
            assert journal._writer.execute(f"PRAGMA {name}").fetchone() == (setting,)
        compacted = journal.compact()
    assert synced == {compacted.stat().st_ino: True, tmp_path.stat().st_ino: True}


def test_steps_that_come_close_together_share_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    commits = set()
    with Journal(path) as journal, closing(sqlite3.connect(f"{path}.db")) as db:
        journal.flush()
        began = time.monotonic()
        for n in range(100):
            journal.put(key(n), value(n))
            time.sleep(0.001)
            commits.add(db.execute("PRAGMA data_version").fetchone())
        took = time.monotonic() - began
    assert 2 <= len(commits) <= took / PACE_S + 3


@pytest.mark.parametrize(
    "damage, left",
    [
        (lambda wal: wal[:-1], {50}),
        (lambda wal: wal[:-3000], {50}),
        (lambda wal: wal[: len(wal) // 2], {10, 20, 30, 40}),
        (lambda wal: wal[:-700] + NOISE, {50}),
        (lambda wal: wal + NOISE, {60}),
        (lambda wal: wal + bytes(9000), {60}),
    ],
)
def test_a_half_written_tail_is_dropped_and_asked_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], left: set[int]
) -> None:
    path = tmp_path / "journal.jsonl"
    torn = tmp_path / "torn/journal.jsonl"
    torn.parent.mkdir()
    with Journal(path) as journal:
        for n in range(60):
            journal.put(key(n), value(n))
            if n % 10 == 9:
                journal.flush()
        shutil.copy(f"{path}.db", f"{torn}.db")
        Path(f"{torn}.db-wal").write_bytes(damage(Path(f"{path}.db-wal").read_bytes()))
    found = known(torn, 60)
    assert found == list(range(len(found))) and len(found) in left
    fill(torn, range(60))
    assert compacted(torn) == compacted(path)


def test_a_second_process_is_told_who_has_the_journal_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "heir = os.fork()\nif heir: say(heir)\ntime.sleep(60)"  # a child of its own does not inherit the lock
    )
    with process(path, code) as child:
        heir = int(line(child))
        try:
            with pytest.raises(JournalError, match=rf"journal\.jsonl is in use by pid {child.pid}\b"):
                Journal(path)
            child.kill()
            child.wait()
            with Journal(path) as journal:
                journal.put("k", {})
        finally:
            os.kill(heir, signal.SIGKILL)


def test_a_process_opens_a_journal_once_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path):
        with pytest.raises(JournalError, match="in use by this process"):
            Journal(tmp_path / "../" / tmp_path.name / "journal.jsonl")
        with process(path, "") as child:
            assert child.wait() == 1
    with Journal(path):
        pass


def test_a_fork_that_exits_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "if not os.fork(): sys.exit()\n"
        "os.wait(); journal.put(key(0), value(0)); journal.flush(); say('on'); time.sleep(60)"
    )
    with process(path, code) as child:
        assert line(child) == "on"
        with pytest.raises(JournalError, match=str(child.pid)):
            Journal(path)
        child.kill()
    assert known(path, 2) == [0]


def test_equal_steps_are_compacted_to_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        order = list(range(400))
        random.Random(seed).shuffle(order)
        path = tmp_path / str(seed) / "journal.jsonl"
        for part in range(seed + 1):
            fill(path, order[part :: seed + 1])
        files.append(compacted(path))
        assert [file.name for file in path.parent.iterdir()] == ["journal.jsonl"]
    assert files[0] == files[1] == files[2]
    rows = [json.loads(row) for row in files[0].splitlines()]
    assert [row["key"] for row in rows] == sorted(key(n) for n in range(400))
    assert {row["key"]: row["value"] for row in rows} == {key(n): value(n) for n in range(400)}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 60])
def test_a_compacted_journal_knows_all_it_had_and_takes_in_more(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, range(0, 2 * steps, 2))
    before = compacted(path)
    assert known(path, 2 * steps + 1) == list(range(0, 2 * steps, 2))
    assert compacted(path) == before
    fill(path, range(2 * steps + 5))
    fill(tmp_path / "at once/journal.jsonl", range(2 * steps + 5))
    assert compacted(path) == compacted(tmp_path / "at once/journal.jsonl")
    assert known(path, 2 * steps + 9) == list(range(2 * steps + 5))


def test_half_a_line_at_the_end_of_a_compacted_journal_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, range(30))
    whole = compacted(path)
    path.write_bytes(whole[:-5])
    assert len(known(path, 30)) == 29
    fill(path, range(30))
    assert compacted(path) == whole


def test_a_foreign_file_is_no_compacted_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"id": "q1", "question": "How many?"}\n')
    with Journal(path) as journal, pytest.raises(JournalError, match="move it away"):
        journal.get("k")


def test_compaction_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    path, kept = tmp_path / "journal.jsonl", tmp_path / "kept"
    fill(path, range(STEPS))
    shutil.copytree(tmp_path, kept)
    whole = compacted(path)
    shutil.copy(kept / "journal.jsonl.db", f"{path}.db")  # killed after the file took its name
    assert known(path) == list(range(STEPS)) and compacted(path) == whole
    chance, halves = random.Random(2), 0
    for _ in range(6):
        path.unlink(missing_ok=True)
        shutil.copy(kept / "journal.jsonl.db", f"{path}.db")
        with process(path, "say('go'); journal.compact()") as child:
            assert line(child) == "go"
            time.sleep(chance.uniform(0, 0.02))
            child.kill()
        part = Path(f"{path}.part")
        halves += part.exists()
        Journal(path).close()
        assert not part.exists()
        assert compacted(path) == whole
        assert sorted(file.name for file in tmp_path.iterdir()) == ["journal.jsonl", "kept"]
    assert halves


def test_a_full_disk_is_told_at_the_next_call_and_what_was_durable_stays(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, range(20))
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))
for call in (lambda: [journal.put(key(n), value(n)) or n % 50 or journal.flush() for n in range(100000)],
             journal.flush, lambda: journal.put(key(5), value(5)), journal.compact, journal.close):
    try:
        call()
        say("nothing")
    except JournalError as error:
        say(error)
journal.close()
"""
    said = finished(path, code).splitlines()
    assert len(said) == 5 and len(set(said)) == 1
    assert "journal.jsonl could not be written: " in said[0] and ("full" in said[0] or "I/O" in said[0])
    found = known(path)
    assert found == list(range(len(found))) and len(found) >= 50


def test_an_error_of_the_disk_is_told_even_when_only_the_thread_has_seen_it(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"could not be written: .*no such table"), open_broken(tmp_path):
        pass
    with pytest.raises(KeyError, match="asked") as raised, open_broken(tmp_path):
        raise KeyError("asked")
    assert "could not be written" in raised.value.__notes__[0]
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.put("k", {})


@contextmanager
def open_broken(folder: Path) -> Iterator[Journal]:
    with Journal(folder / "journal.jsonl") as journal:
        journal._writer.execute("DROP TABLE steps")
        journal.put("k", {})
        yield journal


def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Path(f"{path}.db").write_bytes(b"not a database" * 1000)
    for _ in range(2):  # the lock was given back
        with pytest.raises(
            JournalError, match=r"journal\.jsonl\.db could not be opened: file is not a database"
        ):
            Journal(path)


def test_compaction_that_fails_keeps_the_steps(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    fill(path, range(30))
    with Journal(path) as journal:
        path.mkdir()
        with pytest.raises(JournalError, match="could not be compacted"):
            journal.compact()
        path.rmdir()
        assert journal.get(key(3)) == value(3)
        journal.compact()
    assert known(path, 30) == list(range(30))


def test_what_is_not_json_is_refused_and_spoils_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        for bad in ({"score": float("nan")}, {"step": object()}):
            with pytest.raises((ValueError, TypeError)):
                journal.put("k", bad)
        journal.put("k", {"score": 1.5})
        journal.flush()
        assert journal.get("k") == {"score": 1.5} and journal.written == 1


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.close()
    journal.close()
    for call in (journal.flush, journal.compact, lambda: journal.get("k"), lambda: journal.put("k", {})):
        with pytest.raises(JournalError, match="is closed"):
            call()


def test_a_fast_caller_waits_for_the_disk_at_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = """
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def run(steps):
    for n in steps: journal.put(step_key("q", 0, n, ""), {"text": "w" * 4000})
run(range(6000)); before = peak(); run(range(6000, 24000)); journal.close(); say(peak() - before)
"""
    assert int(finished(path, code)) < 16  # MiB, for 72 MB of steps
    with sqlite3.connect(f"{path}.db") as db:
        assert db.execute("SELECT count(*) FROM steps").fetchone() == (24000,)


def test_a_hash_follows_from_all_that_is_asked() -> None:
    asked: list[Any] = [["q1", "é"], 4, {"temperature": 0.7, "top_p": 0.9}, 17]
    assert payload_hash(*asked) == payload_hash(*[["q1", "é"], 4, {"top_p": 0.9, "temperature": 0.7}, 17])
    assert payload_hash(*asked) == "6209e9ca59513f9d819912d5"
    changed = [[["é", "q1"], *asked[1:]], [*asked[:3], 18], [asked[0], 5, *asked[2:]], asked[:3], [asked]]
    assert len({payload_hash(*asked), *(payload_hash(*other) for other in changed)}) == 6
    assert len(payload_hash("\ud83d")) == 24
