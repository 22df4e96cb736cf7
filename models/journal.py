"""A journal of finished steps: what is in it is never asked of an engine again, whenever a kill came.

    with Journal(".work/generate/ab12/journal.jsonl") as journal:
        step = step_key("q17", 0, 2, payload_hash(prompt, sampling.__dict__))  # record, sample, step
        journal.get(step)                          # None: unknown
        journal.put(step, {"title": "Read", ...})  # durable within 50 ms
        journal.compact()                          # all done: one sorted file

Until then steps live in an SQLite database in WAL mode, written in groups by a thread of its own. At 3,000
steps/s of 1 KB (serialised) it took 14-20 µs of CPU a step, and 36 ms for the slowest to be durable; an
append-only log with its index in SQLite 13-16 and 28: no reason to write recovery and a store anew.

Steps become durable in the order they were put. One process at a time: a POSIX lock, which goes with its
process and which, unlike flock, the children of a killed one do not keep. SQLite in this mode needs a
local disk.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import heapq
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, takewhile
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

PACE_S = 0.020
"""Least time from the start of one group commit to the next: what a step may wait for others."""
MOST_WAITING = 4 << 20
"""Bytes of steps not yet written above which `put` waits for the disk."""
CACHE_KIB = 4 << 10
"""Of pages, the writer's and the reader's each; what the system holds of the file is as near."""
ROWS, MOST_ROWS = 32, 512
"""Rows in one statement: multiples of 32 up to 512."""
PAGE_BYTES = 8192
CHECKPOINT_PAGES = 256
"""Size of the WAL at which SQLite folds it into the database; one commit in some twenty waits for that."""

_SCHEMA = "CREATE TABLE IF NOT EXISTS steps (key TEXT PRIMARY KEY, value BLOB)"
_INSERT = "INSERT OR IGNORE INTO steps VALUES "
_ROW = "(?, ?)"
_SELECT = "SELECT key, value FROM steps WHERE key = ?"
_RANGE = "SELECT key, value FROM steps WHERE key >= ? AND key < ?"
_SORTED = "SELECT key, value FROM steps ORDER BY key"
_ENTRY_BYTES = 400  # of a waiting step, beside its value
_VALUE = b', "value": '  # cannot be part of a JSON string, in which every quote stands behind a backslash
_PLAIN, _ESCAPED = (
    {sort: json.JSONEncoder(ensure_ascii=escape, allow_nan=False, sort_keys=sort) for sort in (False, True)}
    for escape in (False, True)
)
_held: set[Path] = set()


class JournalError(RuntimeError):
    """The journal cannot be opened, read or written; the message says what to do."""


def step_key(record: str, sample: int, step: int | str, payload: str) -> str:
    """What tells a step from all others, and sorts the steps of a record together. payload: payload_hash."""
    return f"{record}/{sample}/{step}:{payload}"


def payload_hash(*asked: Any) -> str:
    """What is asked as 24 hexadecimal digits: a hash of its JSON, whatever the order of the keys."""
    return hashlib.sha256(_json(asked, sort_keys=True)).hexdigest()[:24]


class Journal:
    """Finished steps by key, on disk; values are JSON objects.

    path: the file that `compact` makes; while work goes on, working files stand beside it.
    replayed: how many `get` have found. written: entries that this process has made durable.
    Raises JournalError when another process has it open (naming its pid).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.replayed = 0
        self.written = 0
        self._lock = _Lock(self._beside(".lock"))
        try:
            self._beside(".part").unlink(missing_ok=True)
            self._compacted = SortedLines(self.path) if self.path.exists() else None
            self._writer = _writer(self._beside(".db"))
            self._reader = _reader(self._beside(".db"))
        except BaseException:
            self._lock.release()
            raise
        self._waiting: dict[str, bytes] = {}
        self._writing: dict[str, bytes] = {}
        self._waiting_bytes = 0
        self._accepted = 0
        self._settled = 0
        self._hurry = self._closing = self._closed = False
        self._error: BaseException | None = None
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def get(self, key: str) -> dict[str, Any] | None:
        """The value put for the key, durable yet or not; None when there is none.

        Raises JournalError when the disk cannot be read.
        """
        with self._changed:
            self._refuse_closed()
            waiting = self._waiting.get(key) or self._writing.get(key)
        # What is on disk is asked last and believed first: a thread may have written it in between, and the
        # first value put for a key stays.
        value = self._on_disk(key) or waiting
        if value is None:
            return None
        self.replayed += 1
        return json.loads(value)

    def steps_of(self, record: str) -> dict[str, dict[str, Any]]:
        """All steps of a record by key: `record/…`. Raises JournalError when the disk cannot be read."""
        first, after = f"{record}/", f"{record}0"  # 0 follows /
        with self._changed:
            self._refuse_closed()
            steps = {
                key: value
                for waiting in (self._waiting, self._writing)
                for key, value in waiting.items()
                if key.startswith(first)
            }
        steps |= self._rows_on_disk(_RANGE, (first, after))  # the first value put for a key stays
        if self._compacted:
            steps |= self._compacted.between(first, after)
        self.replayed += len(steps)
        return {key: json.loads(value) for key, value in steps.items()}

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Make a value durable soon; returns at once unless the disk is behind. A known key keeps its value.

        Raises ValueError or TypeError for what is not JSON (NaN is not), JournalError when an earlier step
        could not be written.
        """
        text = _json(value)
        if self._compacted and self._compacted.find(key) is not None:
            return
        with self._changed:
            self._check()
            while self._waiting_bytes > MOST_WAITING:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait()
                self._check()
            if key in self._waiting or key in self._writing:
                return
            self._waiting[key] = text
            self._waiting_bytes += len(text) + _ENTRY_BYTES
            self._accepted += 1
            if len(self._waiting) == 1:
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all put so far is durable. Raises JournalError when it cannot be."""
        with self._changed:
            self._check()
            goal = self._accepted
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._settled >= goal or self._error)
            self._check()

    def compact(self) -> Path:
        """Put all into one file, a line a step, sorted by key, and close; returns its path.

        Equal steps give equal bytes, whatever the order they arrived in. Killed at any moment, or raising
        JournalError, it leaves the working files to a next try; a compacted journal can be opened again.
        """
        self.flush()
        try:
            if self._compacted is None or self._reader.execute("SELECT 1 FROM steps LIMIT 1").fetchall():
                _write_durably(self.path, self._beside(".part"), self._lines())
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{self.path} could not be compacted: {error}. The steps are safe") from error
        self._close(remove=True)
        return self.path

    def close(self) -> None:
        """Make durable what was put, and let others open the journal. Idempotent.

        Raises JournalError when a step could not be written.
        """
        if not self._closed and os.getpid() == self._owner:  # and not in a fork, at its exit
            self._close(remove=False)
            self._raise_error()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except JournalError as lost:
            if error is None:
                raise
            error.add_note(str(lost))

    def _write(self) -> None:
        """The thread: one commit for all that came while the last was written and PACE_S went by."""
        begun = -PACE_S
        try:
            while self._take(begun + PACE_S):
                begun = time.monotonic()
                new = self._insert(list(self._writing.items()))
                with self._changed:
                    self.written += new
                    self._settled += len(self._writing)
                    self._writing = {}
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _insert(self, steps: list[tuple[str, bytes]]) -> int:
        """Make the steps durable; returns how many are new.

        One statement for many rows, which is also the transaction: sqlite3 lets go of the interpreter's lock
        for every statement, and a busy main thread may keep it for 5 ms each time. The last row, repeated,
        fills a statement up (what is known is ignored), so that few different ones are prepared.
        """
        new = 0
        for start in range(0, len(steps), MOST_ROWS):
            rows = steps[start : start + MOST_ROWS]
            rows += [rows[-1]] * (-len(rows) % ROWS)
            values = ", ".join([_ROW] * len(rows))
            new += self._writer.execute(_INSERT + values, list(chain.from_iterable(rows))).rowcount
        return new

    def _take(self, not_before: float) -> bool:
        """Wait for steps to write, and then for more of them until the time has come; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            while not (self._hurry or self._closing) and (left := not_before - time.monotonic()) > 0:
                self._changed.wait(left)
            self._writing, self._waiting = self._waiting, {}
            self._waiting_bytes = 0
            self._hurry = False
            self._changed.notify_all()
            return bool(self._writing)

    def _on_disk(self, key: str) -> bytes | None:
        if self._compacted and (value := self._compacted.find(key)) is not None:
            return value
        return self._rows_on_disk(_SELECT, (key,)).get(key)

    def _rows_on_disk(self, select: str, values: tuple[str, ...]) -> dict[str, bytes]:
        try:
            return dict(self._reader.execute(select, values))
        except sqlite3.Error as error:
            raise JournalError(f"{self._beside('.db')} could not be read: {error}") from error

    def _lines(self) -> Iterator[bytes]:
        """All steps as lines of the compacted file, sorted, each key once."""
        steps = ((key, _line(key, value)) for key, value in self._reader.execute(_SORTED))
        last = None
        for key, line in heapq.merge(self._compacted or (), steps, key=itemgetter(0)):
            if key != last:
                yield line
            last = key

    def _close(self, remove: bool) -> None:
        self._closed = True
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._reader.close()
        self._writer.close()
        if self._compacted:
            self._compacted.close()
        if remove:
            for suffix in (".db", ".db-wal", ".db-shm"):
                self._beside(suffix).unlink(missing_ok=True)
        self._lock.release()
        atexit.unregister(self.close)

    def _check(self) -> None:
        self._refuse_closed()
        self._raise_error()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise JournalError(f"{self.path} is closed")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise JournalError(
                f"{self.path} could not be written: {self._error}. What was durable before is kept: "
                "put the disk right and run again"
            ) from self._error

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)


class SortedLines:
    """A compacted journal, read in place: a step is found by bisection. Half a line at its end is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("r+b")
        self._end = _end_of_last_line(self._file)
        self._file.truncate(self._end)

    def find(self, key: str) -> bytes | None:
        """The JSON of the key's value."""
        for found, value in self._from(key):
            return value if found == key else None
        return None

    def between(self, first: str, after: str) -> dict[str, bytes]:
        """The JSON of the values whose keys are `first` or behind it, and before `after`."""
        return dict(takewhile(lambda step: step[0] < after, self._from(first)))

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Keys and whole lines, in order."""
        self._file.seek(0)
        for line in self._file:
            yield self._parse(line)[0], line

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _from(self, key: str) -> Iterator[tuple[str, bytes]]:
        """Keys and values from the first line on whose key is this one or behind it."""
        low, high = 0, self._end  # that line begins at low or after it, and at high or before it
        while low < high:
            middle = (low + high) // 2
            begin, line = self._line_from(middle)
            if begin >= high or self._parse(line)[0] >= key:
                high = middle
            else:
                low = begin + len(line)
        while low < self._end:
            low, line = self._line_from(low)
            yield self._parse(line)
            low += len(line)

    def _line_from(self, position: int) -> tuple[int, bytes]:
        """Where the first line begins that does so at the position or after it, and that line."""
        begin = self._file.seek(max(0, position - 1))
        if position:
            begin += len(self._file.readline())
        return begin, self._file.readline()

    def _parse(self, line: bytes) -> tuple[str, bytes]:
        head, _, value = line.partition(_VALUE)
        try:
            return json.loads(head + b"}")["key"], value[: -len(b"}\n")]
        except (ValueError, TypeError, KeyError):
            raise JournalError(f"{self._path} is no compacted journal of steps: move it away") from None


class _Lock:
    """This process and no other. The file names its holder; one left by a kill is in nobody's way."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        if self._path in _held:
            self._refuse("this process")
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(0.05)  # its holder may just be writing its pid
                holder = os.pread(self._file, 20, 0).decode()
                os.close(self._file)
                self._refuse(f"pid {holder}")
            if self._is_there():
                break
            os.close(self._file)
        os.truncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)
        _held.add(self._path)

    def release(self) -> None:
        """Let others in."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        _held.discard(self._path)

    def _is_there(self) -> bool:
        """Whether the file locked is the one that others will open: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def _refuse(self, holder: str) -> NoReturn:
        raise JournalError(f"{self._path.with_suffix('')} is in use by {holder}: wait for it or stop it")


def _writer(path: Path) -> sqlite3.Connection:
    """The one connection that writes and folds the WAL into the database."""
    try:
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(_SCHEMA)
    except sqlite3.Error as error:
        raise JournalError(f"{path} could not be opened: {error}") from error
    if mode != "wal":
        raise JournalError(f"{path}: no SQLite database in WAL mode here: use a local disk")
    return db


def _reader(path: Path) -> sqlite3.Connection:
    """One more connection: what the writer commits does not keep it waiting."""
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=60, check_same_thread=False)
    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    return db


def _write_durably(path: Path, part: Path, lines: Iterable[bytes]) -> None:
    with part.open("wb", buffering=1 << 20) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _line(key: str, value: bytes) -> bytes:
    return b'{"key": ' + _json(key) + _VALUE + value + b"}\n"


def _json(value: Any, sort_keys: bool = False) -> bytes:
    """JSON as UTF-8; half a surrogate pair, which a model may write, as its escape."""
    try:
        return _PLAIN[sort_keys].encode(value).encode()
    except UnicodeEncodeError:
        return _ESCAPED[sort_keys].encode(value).encode()


def _end_of_last_line(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - (1 << 16))
        file.seek(begin)
        if newline := file.read(end - begin).rfind(b"\n") + 1:
            return begin + newline
        end = begin
    return 0
