"""Runs one command and lets nothing of it outlive the process that asked for it (a script).

    python -P flows/supervise.py PARENT_PID -- dvc repro --single-item judge

`kill -9` of the flow leaves its children running: a stage would then train on, beside the one that a second
run starts. So between the flow and `dvc` stands this process. It ends the whole tree below it when its parent
is gone, when it is told to stop (SIGTERM), or when the command itself ends and leaves processes behind; then
a server that is to wait for the next stage stays (models/engines/keeper.py: it ends itself).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import psutil

POLL_S = 0.2
GRACE_S = 10.0
LINGERS = "LONGVIEW_LINGERS"
"""In the environment of a server that may outlive its stage."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Process(Protocol):
    """What is guarded: a subprocess.Popen, or one that waits as it does."""

    def wait(self, timeout: float) -> int: ...


class Supervisor:
    """Adopts what its children leave behind, and ends it. SIGTERM ends the process that is guarded."""

    def __init__(self, parent: int) -> None:
        self._parent, self._stopping = parent, False
        signal.signal(signal.SIGTERM, self._stop)
        # Ctrl-C reaches the stage itself; the flow then sends SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _prctl(PR_SET_CHILD_SUBREAPER)  # what a killed `dvc` leaves behind becomes our child, not init's

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def guard(self, process: Process) -> int:
        """Wait for the end of the process and of all that it started; its status (128 + signal if killed)."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=POLL_S)
                _end_descendants(spare_lingering=True)
                return status if status >= 0 else 128 - status
            if self._stopping or os.getppid() != self._parent:
                _end_descendants()
                self._stopping = False
                return 128 + signal.SIGTERM


def main() -> int:
    """Exit with the command's status."""
    parent, command = int(sys.argv[1]), sys.argv[sys.argv.index("--") + 1 :]
    return Supervisor(parent).guard(subprocess.Popen(command, preexec_fn=die_with_parent))


def die_with_parent() -> None:
    """For a child between fork and exec: SIGKILL when its parent ends, Ctrl-C as by default."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int = 1) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_descendants(spare_lingering: bool = False) -> None:
    """First politely, so that a stage can flush its journal; then by force."""
    import psutil

    for sign in (signal.SIGTERM, signal.SIGKILL):
        left = psutil.Process().children(recursive=True)
        if spare_lingering:
            lingering = {child for child in left if _lingers(child)}
            below = {child for keeper in lingering for child in _children(keeper)}
            left = [child for child in left if child not in lingering | below]
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.send_signal(sign)
        if left:
            psutil.wait_procs(left, timeout=GRACE_S)


def _lingers(process: psutil.Process) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return LINGERS in process.environ()
    return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


if __name__ == "__main__":
    sys.exit(main())
