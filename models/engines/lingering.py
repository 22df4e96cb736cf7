"""A vLLM server that outlives the stage that started it, for the next one to take over, with new weights.

    borrower = Borrower(settings, weights, probing, connect, linger_s=120, home=Path(".work/servers"))
    with borrower.borrow() as server:
        engine = OpenAIEngine(server.url, server.model, revive=server.revive)

A keeper, a process of its own, owns the server (models.engines.server). Whoever uses it holds a lock on a
file, which the kernel releases however the user ends: shared to use it, exclusive to start it or to change
its weights. When nobody has held the lock for linger_s the keeper ends the server and itself. `stop_all` ends
all of a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from models.engines.base import Engine, EngineError
from models.engines.process import POLL_S, Report, say
from models.engines.server import Server, ServerSettings
from models.engines.weights import (
    EXTENSION,
    EXTENSION_FOLDER,
    PLAIN_RELOAD,
    RELOAD,
    Adapter,
    Probing,
    Weights,
    swap,
)
from models.probe import FILE as PROBE_FILE

SERVED_NAME = "longview"
"""What the server calls its model, whatever its weights."""
MARK = "LONGVIEW_LINGERS"
"""In the environment of a keeper and all below it: flows/supervise.py leaves them alone when a stage ends."""
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
OURS = ("--host", "--port", "--model", "--served-model-name")
"""Arguments that nobody else may give: development mode is for loopback only."""
SETTLE_S = 2.0
"""Longer than a keeper that looks whether anybody is there holds the lock."""
WEIGHTS_SUFFIXES = (".safetensors", ".safetensors.index.json")
ALWAYS_MINE = ("CUDA_VISIBLE_DEVICES", "VLLM_")
KEEPER = (
    "import sys; sys.path[:] = sys.argv[1].split(':'); from models.engines.lingering import _keep; _keep()"
)


@dataclass(frozen=True)
class State:
    """What a keeper and its users know of a server. started: psutil's create_time of the keeper; url: empty
    while it is loading."""

    pid: int
    started: float
    weights: Weights
    linger_s: float
    url: str = ""

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


@dataclass
class Borrowed:
    """A server in use. model: what requests call it."""

    url: str
    model: str
    revive: Callable[[], None]


Connect = Callable[[str, str], Engine]
"""connect(url, model): an engine that asks the server."""


@dataclass
class Borrower:
    """How one stage comes by a server. swaps: counts `reloads` and `restarts`."""

    settings: ServerSettings
    weights: Weights
    probing: Probing
    connect: Connect
    linger_s: float
    home: Path
    swaps: Counter[str] = field(default_factory=Counter)
    report: Report = say

    def __post_init__(self) -> None:
        s = self.settings
        names = [argument.partition("=")[0] for argument in s.arguments]
        if given := [name for name in names if name in OURS]:
            raise EngineError(f"a server that lingers has its own {given[0]}: leave it out of `arguments`")
        self.method = PLAIN_RELOAD if "--worker-extension-cls" in names else RELOAD
        extension = [] if self.method == PLAIN_RELOAD else ["--worker-extension-cls", EXTENSION]
        self.settings = replace(
            s,
            arguments=[*s.arguments, "--served-model-name", SERVED_NAME, *extension],
            environment={**s.environment, **ENVIRONMENT, **_import_path(s)},
        )
        self.files = Files(self.home, _key(self.settings, self.weights.model))

    @property
    def model(self) -> str:
        """What requests call it."""
        return self.weights.adapter.name if self.weights.adapter else SERVED_NAME

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Borrowed]:
        """The server, with the weights, for as long as the block. If others use it with other weights it is
        one of the block's own. Raises EngineError."""
        with Lease(self.files["lock"]) as lease:
            state = self._obtain(lease)
            if state is not None:
                yield Borrowed(state.url, self.model, lambda: self._revive(state))
                return
        self.report(
            f"{self.weights.model}: the lingering server is in use with other weights; starting another"
        )
        with Server(_with(self.settings, self.weights), self.report) as server:
            self.probing.check(self.connect(server.url, self.model))
            yield Borrowed(server.url, self.model, server.revive)

    def _obtain(self, lease: Lease) -> State | None:
        """A server with our weights, and the shared lock; None if others use it with other ones."""
        mismatch_since: float | None = None
        while True:
            if lease.take(fcntl.LOCK_EX):
                state = self._prepare()
                if lease.take(fcntl.LOCK_SH) and self.files.read() == state:  # nobody came in between
                    return state
            elif lease.take(fcntl.LOCK_SH):
                state_now = self.files.read()
                if state_now is not None and state_now.url and state_now.weights == self.weights:
                    return state_now
                lease.take(fcntl.LOCK_UN)
                mismatch_since = mismatch_since or time.monotonic()
                if time.monotonic() - mismatch_since > SETTLE_S:
                    return None
            time.sleep(POLL_S)

    def _prepare(self) -> State:
        """The server as it is to be, whatever there was. We alone hold the lock."""
        state = self.files.read()
        if state is not None and not state.url:  # whoever started it is gone
            state = self._await(state.pid)
        if state is not None:
            why = self._adopt(state)
            if why is None:
                state = replace(state, weights=self.weights, linger_s=self.linger_s)
                self.files.write(state)
                return state
            self.swaps["restarts"] += 1
            self.report(f"{self.weights.folder}: the lingering server is started again: {why}")
            end(state)
        state = self._start()
        try:
            self.probing.check(self.connect(state.url, self.model))
        except BaseException:
            end(state)
            raise
        return state

    def _adopt(self, state: State) -> str | None:
        """Make a running server serve our weights; why it cannot be trusted to, if so."""
        probing = self.probing
        try:
            if state.weights == self.weights:
                probing.check(self.connect(state.url, self.model))
                return None
            if probing.probe is None:
                return f"{self.weights.folder} has no {PROBE_FILE} to tell whether a reload went well"
            if state.weights.version != self.weights.version and not Path(self.weights.model).is_dir():
                return f"{self.weights.model} is not a folder that it could reload"
            old = state.weights.adapter.name if state.weights.adapter else SERVED_NAME
            before = probing.distance(self.connect(state.url, old))
            swap(state.url, state.weights, self.weights, self.method)
            after = probing.distance(self.connect(state.url, self.model))
        except EngineError as error:
            return str(error)
        if not probing.agrees(after) or after >= before:
            return (
                f"after the reload its log-probs differ from the trainer's by {after:.4f} a token on average "
                f"({before:.4f} before, {probing.tolerance:g} allowed)"
            )
        self.swaps["reloads"] += 1
        self.report(
            f"{self.weights.folder}: weights reloaded, log-probs within {after:.4f} of the trainer's "
            f"({before:.4f} before)"
        )
        return None

    def _start(self) -> State:
        """A keeper, and its server once it is ready. Raises EngineError as Server.start does."""
        for kind in ("json", "error", "log"):
            self.files[kind].unlink(missing_ok=True)
        job = {
            "home": str(self.home),
            "key": self.files.key,
            "settings": {**asdict(self.settings), "log": str(self.settings.log)},
            "weights": asdict(self.weights),
            "linger_s": self.linger_s,
        }
        environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
        with self.files["log"].open("ab") as log:
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
        return self._await(keeper.pid)

    def _await(self, pid: int) -> State:
        """Until a keeper's server is ready; what it says is reported."""
        shown = 0
        while True:
            running = _runs(pid)
            lines = _lines(self.files["log"])
            for line in lines[shown:]:
                self.report(line)
            shown = len(lines)
            state = self.files.read()
            if state is not None and state.pid == pid and state.url:
                return state
            if not running:
                raise EngineError(_text(self.files["error"]) or "\n".join(lines[-30:]) or "the keeper died")
            time.sleep(POLL_S)

    def _revive(self, state: State) -> None:
        """The keeper starts a server that died again; nobody starts the keeper again."""
        if not state.alive():
            why = _text(self.files["error"]) or f"its keeper was ended (see {self.files['log']})"
            raise EngineError(f"the server is gone: {why}")


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
        """Raises EngineError if the server does not start, or dies too often; _Over in the end."""
        state = self._state()
        server = Server(_with(self.settings, state.weights), self._say)
        try:
            server.start()
            self.files.write(replace(state, url=server.url))
            while True:
                self._go_on()
                self._look_after(server)
                time.sleep(POLL_S)
        finally:
            server.stop()
            self.files["json"].unlink(missing_ok=True)

    def _look_after(self, server: Server) -> None:
        """A server that died is started again with the weights that it had; one that nobody uses is not."""
        try:
            server.check()
        except EngineError:
            if self.lease.take(fcntl.LOCK_EX):
                raise
            server.settings = _with(self.settings, self._state().weights)
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


def _with(settings: ServerSettings, weights: Weights) -> ServerSettings:
    """The server's settings with these weights."""
    adapter = weights.adapter
    modules = ["--lora-modules", f"{adapter.name}={adapter.path}"] if adapter else []
    return replace(settings, model=weights.model, arguments=[*settings.arguments, *modules])


def _import_path(settings: ServerSettings) -> dict[str, str]:
    """So that vLLM finds EXTENSION."""
    given = settings.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": ":".join(filter(None, [str(EXTENSION_FOLDER.resolve()), given]))}


def _key(settings: ServerSettings, model: str) -> str:
    """Of all that a server has for life: what it was started with, and all of its checkpoint but the
    weights."""
    folder = Path(model)
    small = sorted(path for path in folder.glob("*") if path.is_file() and not _is_weights(path.name))
    parts: list[Any] = [list(settings.command), list(settings.arguments), dict(settings.environment)]
    parts += [{name: value for name, value in os.environ.items() if name.startswith(ALWAYS_MINE)}]
    parts += [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in small] or [model]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS_SUFFIXES) or name == PROBE_FILE


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _lines(path: Path) -> list[str]:
    """Its whole lines."""
    return _text(path).rpartition("\n")[0].splitlines()


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
