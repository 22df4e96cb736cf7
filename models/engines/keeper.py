"""The keeper of a vLLM server that outlives its stage: a process of its own that owns it, and ends it in
time.

    files = Files(Path(".work/servers"), key)
    pid = start_keeper(files, settings, weights, linger_s=120)
    state = files.read()            # where the server is, once it is ready
    stop_all(Path(".work/servers"))

Whoever uses the server holds a lock on a file (Lease), which the kernel releases however the user ends. When
nobody has held it for linger_s the keeper ends the server (models.engines.server) and itself. A server that
dies in use is started again, with the weights that it had.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from models.engines.base import EngineError
from models.engines.process import POLL_S
from models.engines.server import Server, ServerSettings
from models.engines.weights import Adapter, Weights

MARK = "LONGVIEW_LINGERS"
"""In the environment of a keeper and all below it: flows/supervise.py leaves them alone when a stage ends."""
KEEPER = "import sys; sys.path[:] = sys.argv[1].split(':'); from models.engines.keeper import _keep; _keep()"


@dataclass(frozen=True)
class State:
    """What a keeper and its users know of a server. started: psutil's create_time of the keeper; url: empty
    while it is loading. changing: somebody began to change its weights."""

    pid: int
    started: float
    weights: Weights
    linger_s: float
    url: str = ""
    changing: bool = False

    def alive(self) -> bool:
        """Whether the keeper is."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        return False


@dataclass(frozen=True)
class Files:
    """Of one server, by what it is: same command, arguments, environment and architecture."""

    home: Path
    key: str

    def __getitem__(self, kind: str) -> Path:
        return self.home / f"{self.key}.{kind}"

    def read(self) -> State | None:
        """The state of a keeper that is alive."""
        try:
            fields = json.loads(self["json"].read_text(encoding="utf-8"))
            weights = fields.pop("weights")
            adapter = weights.pop("adapter")
            state = State(
                **fields, weights=Weights(**weights, adapter=Adapter(**adapter) if adapter else None)
            )
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return state if state.alive() else None

    def write(self, state: State) -> None:
        """Whole or not at all."""
        part = self[f"{os.getpid()}.part"]
        part.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        part.replace(self["json"])

    def remove(self, pid: int) -> None:
        """If it is this keeper's."""
        state = self.read()
        if state is not None and state.pid == pid:
            self["json"].unlink(missing_ok=True)


class Lease:
    """The lock of one server. It ends with the block, or with the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def take(self, how: int) -> bool:
        """fcntl.LOCK_EX, LOCK_SH or LOCK_UN, at once or not at all; a lock that is held is let go for
        another."""
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def start_keeper(files: Files, settings: ServerSettings, weights: Weights, linger_s: float) -> int:
    """Start one; returns its pid at once. What it says is in files["log"], why it could not start its server
    in files["error"]."""
    for kind in ("json", "error", "log"):
        files[kind].unlink(missing_ok=True)
    job = {
        "home": str(files.home),
        "key": files.key,
        "settings": {**asdict(settings), "log": str(settings.log)},
        "weights": asdict(weights),
        "linger_s": linger_s,
    }
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    with files["log"].open("ab") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-c", KEEPER, ":".join(sys.path)],
            env={**environment, MARK: "1"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert keeper.stdin is not None
    with contextlib.suppress(BrokenPipeError), keeper.stdin as told:
        told.write(json.dumps(job).encode())
    return keeper.pid


def end(state: State) -> None:
    """Returns when the keeper and its server are gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(state.pid)
        if process.create_time() != state.started:
            return
        family = [process, *process.children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=60)[1]:
            with contextlib.suppress(psutil.Error):
                left.kill()


def stop_all(home: Path) -> int:
    """End the servers of a folder; returns how many there were."""
    states = [Files(home, path.stem).read() for path in home.glob("*.json")]
    running = [state for state in states if state is not None]
    for state in running:
        end(state)
    return len(running)


def _keep() -> None:
    """The keeper's whole life."""
    job = json.load(sys.stdin)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    files = Files(Path(job["home"]), job["key"])
    adapter = job["weights"].pop("adapter")
    weights = Weights(**job["weights"], adapter=Adapter(**adapter) if adapter else None)
    settings = ServerSettings(
        **{**job["settings"], "log": Path(job["settings"]["log"]), "report_every_s": 2.0}
    )
    started = psutil.Process().create_time()
    files.write(State(os.getpid(), started, weights, job["linger_s"]))
    try:
        with Lease(files["lock"]) as lease:
            _Keeper(files, settings, lease, told).run()
    except _Over:
        pass
    except EngineError as error:
        files["error"].write_text(str(error), encoding="utf-8")
        sys.exit(1)


class _Over(Exception):
    """Nobody wants the server any more."""


class _Keeper:
    """Owns the server until it is told to end, or nobody has used it for linger_s."""

    def __init__(self, files: Files, settings: ServerSettings, lease: Lease, told: Sequence[int]) -> None:
        self.files, self.settings, self.lease, self.told = files, settings, lease, told
        self._used = time.monotonic()

    def run(self) -> None:
        """Raises EngineError if the server does not start; _Over in the end."""
        state = self._state()
        server = Server(with_weights(self.settings, state.weights), self._say)
        try:
            server.start()
            self.files.write(replace(state, url=server.url))
            while True:
                self._go_on()
                self._look_after(server)
                time.sleep(POLL_S)
        finally:
            server.stop()
            self.files.remove(os.getpid())

    def _look_after(self, server: Server) -> None:
        """A server that died is started again with the weights that it had; one that nobody uses is not."""
        try:
            server.check()
        except EngineError:
            if self.lease.take(fcntl.LOCK_EX):
                raise
            server.settings = with_weights(self.settings, self._state().weights)
            server.revive()

    def _say(self, line: str) -> None:
        self._go_on()
        print(line, flush=True)

    def _go_on(self) -> None:
        """Raises _Over, with the lock held, when it is time."""
        if self.told:
            raise _Over
        if not self.lease.take(fcntl.LOCK_EX):
            self._used = time.monotonic()
        elif time.monotonic() - self._used > self._state().linger_s:
            raise _Over
        else:
            self.lease.take(fcntl.LOCK_UN)

    def _state(self) -> State:
        state = self.files.read()
        if state is None or state.pid != os.getpid():  # somebody removed it
            raise _Over
        return state


def with_weights(settings: ServerSettings, weights: Weights) -> ServerSettings:
    """The server's settings with these weights."""
    adapter = weights.adapter
    modules = ["--lora-modules", f"{adapter.name}={adapter.path}"] if adapter else []
    return replace(settings, model=weights.model, arguments=[*settings.arguments, *modules])
