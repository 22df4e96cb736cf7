"""`dvc repro --single-item` without the half second that `dvc` takes to start: forked from one that runs.

    with dvc_server.running(root):
        terminal.run(dvc_server.repro("judge", root, environment), log=log)

For the length of the block one process has imported DVC and read the pipeline once. For each stage it forks,
and is its supervisor (flows/supervise.py) until it ends. It ends with the flow, and with it all below it.
Outside such a block every stage is a command of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

from flows import hashing, lock_file, published, supervise, terminal

REPRO = ("--wait-for-lock", "repro", "--single-item")


def repro(stage: str, root: Path, environment: Mapping[str, str]) -> terminal.Start:
    """What brings one stage up to date, whatever DVC says of those before it."""
    server = _RUNNING.get()
    if server and server.root == root:
        return lambda output: server.start([*REPRO, stage], environment, output)
    return terminal.supervised([sys.executable, "-m", "dvc", *REPRO, stage], root, environment)


@contextmanager
def running(root: Path) -> Iterator[None]:
    """Keep a server for the stages that are run inside."""
    server = Server(root)
    before = _RUNNING.set(server)
    try:
        yield
    finally:
        _RUNNING.reset(before)
        server.stop()


class Server:
    """The flow's side of the process: one stage at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._spawn()

    def _spawn(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", "flows.dvc_server", str(os.getpid()), str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, cwd=self.root, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()

    def start(self, words: Sequence[str], environment: Mapping[str, str], output: int) -> terminal.Started:
        """Run `dvc WORDS` with its output going to a file descriptor."""
        if self._process.poll() is not None:  # killed with the last stage
            self._pipe.close()
            self._spawn()
        self._pipe.send((list(words), dict(environment)))
        send_handle(self._pipe, output, self._process.pid)
        return Running(self._process, self._pipe)

    def stop(self) -> None:
        """End the process, which ends once nobody can ask it."""
        self._pipe.close()
        self._process.wait()


class Running:
    """A command that the server runs, to be used like a subprocess.Popen."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: Connection) -> None:
        self._process, self._pipe = process, pipe
        self._status: int | None = None

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The status, as of `dvc`; -9 if the server was killed. Raises subprocess.TimeoutExpired."""
        if self._status is None:
            if not self._pipe.poll(timeout):
                raise subprocess.TimeoutExpired("dvc", timeout or 0)
            try:
                self._status = int(self._pipe.recv())
            except (EOFError, ConnectionResetError):
                self._status = -signal.SIGKILL
        return self._status

    def terminate(self) -> None:
        """End what runs, not the server."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


_RUNNING: ContextVar[Server | None] = ContextVar("_RUNNING", default=None)


def main() -> None:
    """The server's side: what is asked for, until nobody asks any more."""
    parent, pipe = int(sys.argv[1]), Connection(int(sys.argv[2]))
    supervisor = supervise.Supervisor(parent)
    _warm_up()
    lock_file.install()
    with suppress(EOFError, BrokenPipeError):  # the flow is gone
        while True:
            words, environment = pipe.recv()
            output = recv_handle(pipe)
            child = multiprocessing.get_context("fork").Process(
                target=_become, args=(words, environment, output, pipe)
            )
            child.start()
            os.close(output)
            pipe.send(supervisor.guard(_Forked(child)))


def _warm_up() -> None:
    """Import what a stage needs, by asking what can be asked without changing anything."""
    import dvc.commands.repro  # noqa: F401
    from dvc.cli import parse_args
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    parse_args([*REPRO, "stage"])
    with suppress(DvcException), Repo() as repo:  # the stage will say what is wrong
        list(repo.index.stages)


def _become(words: list[str], environment: Mapping[str, str], output: int, pipe: Connection) -> None:
    """In the child: `dvc`, with the environment and the output that were given."""
    pipe.close()
    supervise.die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    from dvc.cli import main as dvc

    with hashing.once(), published.keyed():
        sys.exit(dvc(words))


class _Forked:
    """A multiprocessing.Process, to be waited for like a subprocess.Popen."""

    def __init__(self, child: Any) -> None:
        self._child = child

    def wait(self, timeout: float) -> int:
        self._child.join(timeout)
        if self._child.exitcode is None:
            raise subprocess.TimeoutExpired("dvc", timeout)
        return int(self._child.exitcode)


if __name__ == "__main__":
    main()
