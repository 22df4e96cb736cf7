"""A command whose output is seen live and kept in a log.

    run(supervised(["ls"], Path("."), os.environ), log=Path("ls.log"))

On a terminal the command gets a pseudo terminal, so its progress bars work; elsewhere a pipe, so it prints
plain lines. The log holds plain lines in both cases: no colours, the last state of a redrawn line.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
DVC_HINTS = (  # what DVC tells people who run it by hand
    b"Updating lock file 'dvc.lock'",
    b"Generating lock file 'dvc.lock'",
    b"To track the changes with git, run:",
    b"\tgit add ",
    b"To enable auto staging, run:",
    b"\tdvc config core.autostage true",
    b"Use `dvc push` to send your updates",
)
SUPERVISOR = Path(__file__).with_name("supervise.py")
STOP_GRACE_S = 30.0


class TimedOut(RuntimeError):
    """The command ran longer than it was allowed to."""


class WithoutHints:
    """Drops DVC's hints, and empty lines after them, from output that comes in any pieces."""

    def __init__(self) -> None:
        self._rest, self._inside, self._dropped = b"", False, False

    def feed(self, data: bytes) -> bytes:
        """What of the output so far may be shown now."""
        shown = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            drop = not self._inside and (
                line.startswith(DVC_HINTS) or (self._dropped and not line.strip(b"\r"))
            )
            shown += b"" if drop else line + b"\n"
            self._inside, self._dropped = False, drop
        may_be_hint = any(hint.startswith(self._rest[: len(hint)]) for hint in DVC_HINTS)
        if self._rest and (self._inside or not may_be_hint):
            shown, self._rest, self._inside = shown + self._rest, b"", True
        return shown


class LogFile:
    """Appends output to a file as plain lines."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rest = b""

    def write(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)
        self._rest = self._rest[self._rest.rfind(b"\r") :] if self._rest.count(b"\r") > 1 else self._rest
        self._file.flush()

    def close(self) -> None:
        if self._rest:
            self._line(self._rest)
        self._file.flush()

    def _line(self, line: bytes) -> None:
        shown = [part for part in ESCAPES.sub(b"", line).rstrip(b"\r").split(b"\r") if part.strip()]
        self._file.write((shown[-1] if shown else b"") + b"\n")


class Started(Protocol):
    """What runs: a subprocess.Popen, or what behaves like one."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[int], Started]
"""Starts a command with its output going to a file descriptor."""


def supervised(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Start:
    """A command under the supervisor: nothing of it outlives this process."""
    guarded = [sys.executable, "-P", str(SUPERVISOR), str(os.getpid()), "--", *command]
    return lambda output: subprocess.Popen(
        guarded, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )


def run(start: Start, *, log: Path, timeout_s: float | None = None, show: bool = True) -> int:
    """Run to the end and return the exit status; nothing is left running. Raises TimedOut."""
    log.parent.mkdir(parents=True, exist_ok=True)
    reading, writing = _channel(show)
    with log.open("ab") as file:
        process = start(writing)
        os.close(writing)
        output = LogFile(file)
        try:
            _copy(process, reading, output, timeout_s, show)
            return process.wait()
        finally:
            _stop(process)
            os.close(reading)
            output.close()


def _channel(show: bool) -> tuple[int, int]:
    if not (show and sys.stdout.isatty()):
        return os.pipe()
    import fcntl
    import pty
    import struct
    import termios

    reading, writing = pty.openpty()
    size = shutil.get_terminal_size()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    return reading, writing


def _copy(process: Started, reading: int, log: LogFile, timeout_s: float | None, show: bool) -> None:
    wanted = WithoutHints()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        ready, _, _ = select.select([reading], [], [], 0.2)
        if ready:
            try:
                data = os.read(reading, 65536)
            except OSError:  # a pseudo terminal says end of file this way
                return
            if not data:
                return
            log.write(data)
            if show:
                _display(wanted.feed(data))
        elif process.poll() is not None:
            return
        if deadline is not None and time.monotonic() > deadline:
            raise TimedOut(f"still running after {timeout_s:.0f} s")


def _display(data: bytes) -> None:
    buffer = getattr(sys.stdout, "buffer", None)
    with contextlib.suppress(BrokenPipeError):
        if buffer is None:
            sys.stdout.write(data.decode("utf-8", "replace"))
        else:
            buffer.write(data)
        sys.stdout.flush()


def _stop(process: Started) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
