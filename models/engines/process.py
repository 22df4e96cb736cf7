"""A process of our own: started, watched, its output in a log, and never left behind.

    process = OwnProcess("the server", Path(".work/server.log"))
    process.start(["python", "-m", "http.server"])
    process.await_ready(lambda: answers("http://127.0.0.1:8000"), "serve")
    process.check()  # EngineError with the end of the log if it has died
    process.stop()

vLLM is several processes, and its engine lives on when the one that was started is killed
(vllm-project/vllm#55510). So a watcher stands between us and the process, in a session of its own. It ends
the process and all that descends from it when it is told to, when our own process is gone (however it ended),
and when the process dies by itself. If the watcher is killed, the process gets SIGTERM, and `stop` kills the
process group. The environment is passed on, so that flows.recovery finds what survives even that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from models.engines.base import EngineError

POLL_S = 0.1
ORPHAN_GRACE_S = 2.0
"""Grace for what a process that died by itself has left: nobody waits for it."""
UNKILLABLE_S = 5.0
"""The watcher gives up on processes that live this long after SIGKILL."""
TRACKER_S = 1.0
LOG_LINES, LOG_BYTES = 30, 1 << 16
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WATCHER = (
    "import sys; sys.path[:] = sys.argv[1].split(':'); from models.engines.process import _watch; _watch()"
)
"""Run with our sys.path (as multiprocessing does) and without PYTHON* variables: those are for the process"""
REMEDIES = {
    r"cannot import name '\w+' from '?vllm|No module named '?vllm\.": (
        "this vLLM is not the version that this was written for: install 0.32, or let it serve "
        "(kind: openai, launch: true)"
    ),
    r"No module named '?vllm": "that interpreter has no vLLM: install it, or name one that has it "
    "(parameter `python`; in code command=vllm_command('/path/to/python'))",
    r"^cannot run ": "correct `command`",
    r"unrecognized arguments": "this vLLM does not know one of the arguments: its --help lists them",
    r"address already in use": "another process took the port meanwhile: start again",
    r"out of memory|memory for the cache block|available KV cache memory \(|desired .PU memory utilization": (
        "the model and its KV cache do not fit: lower --max-model-len, change --gpu-memory-utilization, "
        "or use more GPUs (--tensor-parallel-size)"
    ),
}

Report = Callable[[str], None]
say: Report = partial(print, flush=True)


class OwnProcess:
    """One process of our own, and all that descends from it. name: as messages call it. log: its output is
    appended to it. grace_s: from SIGTERM to SIGKILL."""

    def __init__(
        self,
        name: str,
        log: Path,
        report: Report = say,
        start_timeout_s: float = 900.0,
        grace_s: float = 10.0,
        report_every_s: float = 5.0,
    ) -> None:
        self.name, self.log, self.report = name, log, report
        self.start_timeout_s, self.grace_s, self.report_every_s = start_timeout_s, grace_s, report_every_s
        self.watcher: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._began = 0.0

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        piped: bool = False,
        folder: Path | None = None,
    ) -> None:
        """Start it; returns at once. environment: added to ours. piped: its stdin and stdout are those of
        `watcher`, and only its stderr goes to the log. folder: its temporary files, which go with it."""
        channel = subprocess.PIPE if piped else None
        watcher = [sys.executable, "-E", "-P", "-c", WATCHER, ":".join(sys.path)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self.watcher = subprocess.Popen(
                [*watcher, str(os.getpid()), str(self.grace_s), str(folder or ""), *command],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                stdin=channel or subprocess.DEVNULL,
                stdout=channel or log,
                stderr=log,
                start_new_session=True,
            )

    def await_ready(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until ready() says so; meanwhile the last line of the log is reported. what: is to be waited
        for ("answer /health"). Raises EngineError; what runs is left to `stop`."""
        reported = 0.0
        while not ready():
            self.check()
            if self.elapsed_s > self.start_timeout_s:
                raise self.error(
                    f"{self.name} did not {what} within {self.start_timeout_s:.0f} s: "
                    "if it was still loading, allow more (start_timeout_s)"
                )
            if self.elapsed_s - reported >= self.report_every_s:
                reported = self.elapsed_s
                last = (self._log_end(1) or ["nothing in its log yet"])[0]
                self.report(f"starting {self.name}, {reported:.0f} s: {last[:160]}")
            time.sleep(POLL_S)

    def check(self, within_s: float = 0.0) -> None:
        """Raises EngineError with the end of the log if the process has died, or dies within so many seconds.
        Costs one system call where it need not wait."""
        watcher = self.watcher
        if watcher is None:
            raise EngineError(f"{self.name} is not running: start it")
        status = watcher.poll()
        if status is None and within_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = watcher.wait(within_s)
        if status is not None:
            raise self.error(f"{self.name} {_ended(status)} after {self.elapsed_s:.0f} s")

    def stop(self) -> None:
        """End the process and all that descends from it. Idempotent."""
        watcher, self.watcher = self.watcher, None
        if watcher is None:
            return
        watcher.terminate()
        try:
            watcher.wait(self.grace_s + 2 * UNKILLABLE_S)
        except subprocess.TimeoutExpired:
            watcher.kill()
        if watcher.wait() < 0:  # it was killed itself, and could not do its work
            with contextlib.suppress(ProcessLookupError):
                os.killpg(watcher.pid, signal.SIGKILL)

    def descendants(self) -> set[int]:
        """Their ids, the watcher's left out."""
        return {child.pid for child in _descendants(self.watcher.pid)} if self.watcher else set()

    @property
    def elapsed_s(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._began

    def error(self, what: str) -> EngineError:
        """What has happened, what to do, and the end of the log since the start."""
        lines = self._log_end(LOG_LINES)
        text = "\n".join(lines)
        found = (do for sign, do in REMEDIES.items() if re.search(sign, text, re.IGNORECASE | re.MULTILINE))
        shown = "\n".join(f"  | {line[:500]}" for line in lines) or "  | (nothing)"
        return EngineError(f"{what}; {next(found, 'its log says why')}.\nThe end of {self.log}:\n{shown}")

    def _log_end(self, lines: int) -> list[str]:
        """The last lines of what it has said since it was started, as plain text."""
        data = b""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_BYTES))
            data = log.read()
        text = ESCAPES.sub("", data.decode("utf-8", "replace"))
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-lines:]


def _ended(status: int) -> str:
    """How the process (or its watcher) ended, from the watcher's exit status."""
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return "was killed (SIGKILL: often for want of memory)"
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"died with exit status {status}"


def _watch() -> None:
    """The watcher's whole life. Exits with the process's status, 128 + signal if it was killed."""
    owner, grace_s, folder, command = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:]
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a killed process leaves becomes our child, not init's
    try:
        process = subprocess.Popen(command, preexec_fn=partial(_prctl, PR_SET_PDEATHSIG, signal.SIGTERM))
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)
    _leave_the_pipes()
    while process.poll() is None and not told and os.getppid() == owner:
        time.sleep(POLL_S)
    died = process.returncode
    _end_descendants(process, grace_s if died is None else ORPHAN_GRACE_S)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    status = died if died is not None else 0
    sys.exit(status if status >= 0 else 128 - status)


def _leave_the_pipes() -> None:
    """So that they end with the process that they are for."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)


def _end_descendants(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM for the process, which knows how to end its own; when it is gone, for those it has left;
    SIGKILL for all after the grace. Python's resource tracker outlives the others for a moment: it removes
    the shared memory that they have left, vLLM's 160 MB for one."""
    deadline = time.monotonic() + grace_s
    told: set[int] = set()
    while (left := _descendants()) and time.monotonic() < deadline + UNKILLABLE_S:
        gone = process.poll() is not None
        for descendant in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > deadline + (TRACKER_S if _is_tracker(descendant) else 0):
                    descendant.kill()
                elif descendant.pid not in told and (gone or descendant.pid == process.pid):
                    told.add(descendant.pid)
                    descendant.terminate()
        time.sleep(POLL_S / 2)


def _descendants(pid: int | None = None) -> list[psutil.Process]:
    """The living ones, of this process or another."""
    living = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
    return living


def _is_tracker(process: psutil.Process) -> bool:
    return "multiprocessing.resource_tracker" in " ".join(process.cmdline())


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
