"""A vLLM server that outlives the stage that started it, for the next one to take over, with new weights.

    borrower = Borrower(settings, weights, probing, connect, linger_s=120, home=Path(".work/servers"))
    with borrower.borrow() as server:
        engine = OpenAIEngine(server.url, server.model, revive=server.revive)

A keeper, a process of its own, owns the server (models.engines.keeper). Whoever uses it holds a lock: shared
to use it, exclusive to start it or to change its weights. New weights are trusted if the log-probs of their
probe say so; else the server is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from models.engines.base import Engine, EngineError
from models.engines.keeper import Files, Lease, State, end, start_keeper, with_weights
from models.engines.process import POLL_S, Report, say
from models.engines.server import Server, ServerSettings
from models.engines.weights import (
    EXTENSION,
    EXTENSION_FOLDER,
    PLAIN_RELOAD,
    RELOAD,
    Probing,
    Weights,
    swap,
)
from models.probe import FILE as PROBE_FILE

SERVED_NAME = "longview"
"""What the server calls its model, whatever its weights."""
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
OURS = ("--host", "--port", "--model", "--served-model-name")
"""Arguments that nobody else may give: development mode is for loopback only."""
SETTLE_S = 2.0
"""Longer than a keeper that looks whether anybody is there holds the lock."""
WEIGHTS_SUFFIXES = (".safetensors", ".safetensors.index.json")
ALWAYS_MINE = ("CUDA_VISIBLE_DEVICES", "VLLM_")


@dataclass
class Borrowed:
    """A server in use. model: what requests call it."""

    url: str
    model: str
    revive: Callable[[bool], bool]


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
                yield Borrowed(state.url, self.model, partial(self._revive, state))
                return
        self.report(
            f"{self.weights.model}: the lingering server is in use with other weights; starting another"
        )
        with Server(with_weights(self.settings, self.weights), self.report) as server:
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
                if state_now is not None and state_now.url and state_now.weights.same(self.weights):
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
                state = replace(state, weights=self.weights, linger_s=self.linger_s, changing=False)
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
            if state.changing:
                return "a stage that changed its weights was killed meanwhile"
            if state.weights.same(self.weights):
                probing.check(self.connect(state.url, self.model))
                return None
            if probing.probe is None:
                return f"{self.weights.folder} has no {PROBE_FILE} to tell whether a reload went well"
            if state.weights.version != self.weights.version and not Path(self.weights.model).is_dir():
                return f"{self.weights.model} is not a folder that it could reload"
            old = state.weights.adapter.name if state.weights.adapter else SERVED_NAME
            before = probing.distance(self.connect(state.url, old))
            self.files.write(replace(state, changing=True))
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
        return self._await(start_keeper(self.files, self.settings, self.weights, self.linger_s))

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

    def _revive(self, state: State, hopeless: bool) -> bool:
        """The keeper starts a server that died again; nobody starts the keeper again. As Server.revive."""
        if hopeless or not state.alive():
            why = "it dies again and again" if hopeless else "its keeper was ended"
            why = _text(self.files["error"]) or f"{why} (see {self.files['log']})"
            raise EngineError(f"the server is gone: {why}")
        return False


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
