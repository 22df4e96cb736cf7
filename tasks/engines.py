"""Which engine answers in which role, by parameter: the section `engines` of params.yaml.

    with open_engine("generator", "artifacts/foundation/generator", questions, stage) as engine:
        ...

A 72B generator may sit on a server while the policy has vLLM to itself (docs/engines.md):

    engines:
      generator: {kind: openai, url: "http://gpu-1:8000/v1", model: Qwen/Qwen2.5-VL-72B-Instruct}
      reasoner: {kind: vllm, python: /opt/vllm/bin/python, arguments: [--max-model-len, "16384"]}
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.engines.openai import OpenAIEngine
from models.engines.vllm import VLLMEngine
from models.engines.watched import Prices
from tasks import params
from tasks.stage import WORK, StageRun

if TYPE_CHECKING:
    from models.engines.base import Engine
    from models.engines.canary import Findings
    from models.engines.watched import Throughput
    from models.images import ImageSource
    from models.records import Question

Role = Literal["generator", "answer_judge", "path_judge", "reasoner", "summariser"]
DATA = Path("data")
CONSTRAINED = ("generator", "path_judge")
"""Roles whose replies follow a schema."""
WITHOUT_IMAGES = ("answer_judge",)
"""Roles whose prompts are text alone."""
JUDGES = ("answer_judge", "path_judge")


@dataclass(frozen=True)
class RayScale:
    """Actors on a Ray cluster, each with an engine of its own.

    gpus_per_actor, cpus_per_actor: what each is given. address: of a running cluster (`auto`, `head:6379`);
    None: what RAY_ADDRESS says, or else a cluster on this machine that ends with the stage. restarts: how
    many actors that die are replaced. object_store_mb: memory of a cluster of our own for what is on
    its way.
    """

    actors: int
    gpus_per_actor: float = 0.0
    cpus_per_actor: float = 1.0
    address: str | None = None
    restarts: int = 10
    object_store_mb: int = 200

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise ValueError(f"actors: expected 1 or more, found {self.actors}")
        for name in ("gpus_per_actor", "cpus_per_actor", "restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.gpus_per_actor > 1 and self.gpus_per_actor != int(self.gpus_per_actor):
            raise ValueError(
                f"gpus_per_actor: expected a share or a whole number, found {self.gpus_per_actor}"
            )
        if self.object_store_mb < 80:
            raise ValueError(f"object_store_mb: Ray needs 80 or more, found {self.object_store_mb}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"address: {self.address} is for Ray's client, outside of the cluster; the stage runs on one "
                "of its nodes: `auto`, or the `host:port` of its head"
            )


@dataclass(frozen=True)
class Scale:
    """Where a role's engine runs besides the stage's own process."""

    ray: RayScale


@dataclass(frozen=True)
class EngineParams:
    """kind: local (transformers in the stage's process), openai (a server that speaks OpenAI's chat
    completions), vllm (vLLM's offline engine in a process of its own) or fake (a dry run: every chain is one
    step).

    capacity: rows decoded together, or calls in flight. model: what the server calls the model, or what vLLM
    loads; None: the checkpoint of the role. launch: start vLLM's server for as long as the stage lasts; else
    the one at `url` is used. python, arguments, environment: of what is started (python: None is this
    interpreter; variables in it and in the environment are filled in). api_key_env: variable that holds the
    key. timeout_s: of one call; with vllm, of silence with requests under way. patience_s: how long a server
    may be away. seeded: send seeds. ahead: a judge works behind sampling, question by question (tasks.ahead);
    its engine then stands beside the sampling one. error_budget: share of the requests that may be given up
    on. prices: of a million tokens, for an estimate. linger_s: how long a launched server waits for the next
    stage that wants it (tasks.served). probe_tolerance: mean difference a token, in nats, between the
    log-probs of vLLM and of the trainer; None: by --dtype. scale: sample in several actors, each with this
    engine (tasks.scale_out).
    """

    kind: Literal["local", "openai", "vllm", "fake"] = "local"
    capacity: int = 256
    model: str | None = None
    launch: bool = False
    url: str | None = None
    api_key_env: str | None = None
    python: str | None = None
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    patience_s: float = 900.0
    seeded: bool = True
    ahead: bool = False
    error_budget: float = 0.05
    prices: Prices | None = None
    linger_s: float = 0.0
    probe_tolerance: float | None = None
    scale: Scale | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity: expected 1 or more, found {self.capacity}")
        if self.ahead and self.kind == "local":
            raise ValueError("ahead is for a judge on an engine of its own, not for kind: local")
        if not 0 <= self.error_budget <= 1:
            raise ValueError(f"error_budget: expected a share from 0 to 1, found {self.error_budget}")
        if self.kind == "openai" and self.launch == (self.url is not None):
            raise ValueError("an openai engine needs either `launch: true` or the `url` of a server")
        if self.kind != "openai" and (self.launch or self.url is not None):
            raise ValueError(f"launch and url are for `kind: openai`, not for {self.kind}")
        if self.kind not in ("openai", "vllm") and self.model is not None:
            raise ValueError(f"model is for `kind: openai` and `kind: vllm`, not for {self.kind}")
        if self.linger_s < 0 or (self.linger_s and not self.launch):
            raise ValueError(
                f"linger_s: seconds that a server of `launch: true` waits, found {self.linger_s}"
            )
        if self.probe_tolerance is not None and not self.probe_tolerance > 0:
            raise ValueError(f"probe_tolerance: expected a number above 0, found {self.probe_tolerance}")
        if self.scale is not None and self.linger_s:
            raise ValueError("linger_s is not for an engine with `scale`: its servers end with their actors")

    @property
    def interpreter(self) -> str:
        """What runs vLLM."""
        return os.path.expandvars(self.python) if self.python else sys.executable

    @property
    def independent(self) -> bool:
        """Of Engine, before there is one."""
        return self.kind != "local"

    @property
    def filled_environment(self) -> dict[str, str]:
        """What is added to ours."""
        return {name: os.path.expandvars(value) for name, value in self.environment.items()}

    @property
    def identity(self) -> dict[str, Any]:
        """What may change a text. Where a server stands and how patient we are does not: such a change keeps
        what is journalled."""
        same = {"kind": self.kind, "model": self.model}
        return {**same, "capacity": self.capacity} if self.kind == "local" else same


@dataclass(frozen=True)
class Params:
    """An engine for each role. generator: writes chains step by step; answer_judge: says whether two answers
    mean the same; path_judge: scores paths; reasoner and summariser: the two agents."""

    generator: EngineParams = field(default_factory=EngineParams)
    answer_judge: EngineParams = field(default_factory=EngineParams)
    path_judge: EngineParams = field(default_factory=EngineParams)
    reasoner: EngineParams = field(default_factory=EngineParams)
    summariser: EngineParams = field(default_factory=EngineParams)

    def __post_init__(self) -> None:
        for role in ("answer_judge", "path_judge", "summariser"):
            if getattr(self, role).scale is not None:
                raise ValueError(f"{role}: scale is for the roles that sample: generator and reasoner")


def identities(*roles: Role) -> dict[str, Any]:
    """What of the engines of these roles may change a text, by role: part of what a stage obeys."""
    return {role: engine_params(role).identity for role in roles}


def engine_params(role: Role) -> EngineParams:
    """The engine of a role, from params.yaml; a role that is not named there has the defaults."""
    engine: EngineParams = getattr(params.load("engines", Params), role)
    return engine


@contextmanager
def open_engine(
    role: Role,
    checkpoint: str | Path,
    questions: Sequence[Question],
    stage: StageRun,
    images: ImageSource | Path = DATA,
) -> Iterator[Engine]:
    """The engine of a role. checkpoint: the role's model, unless the parameter names another.

    Where replies are independent of each other they are kept in the stage's scratch folder: what was answered
    before a kill is not asked again, and vLLM and servers are opened with the first request that is not kept,
    and tried with the first of the questions before that. In the end a line says how fast it was. It is one
    engine, whatever `scale` says: what samples in several actors is opened by tasks.sampling.open_sampler.
    Raises EngineError that says what is wrong and what to do, then or at the first request.
    """
    from models.engines.journalled import JournalledEngine
    from models.engines.lazy import LazyEngine
    from models.engines.watched import ErrorBudget, Throughput, WatchedEngine
    from models.journal import Journal

    e = engine_params(role)
    swaps: Counter[str] = Counter()

    @contextmanager
    def opening() -> Iterator[WatchedEngine]:
        with bare_engine(role, e, e.model or str(checkpoint), questions, images, swaps) as engine:
            yield WatchedEngine(engine, ErrorBudget(e.error_budget))

    with ExitStack() as opened:
        if e.independent:
            lazy = opened.enter_context(LazyEngine(opening, e.capacity))
            path = _judged(role, checkpoint, e) if role in JUDGES else stage.scratch / f"{role}.journal"
            yield JournalledEngine(lazy, opened.enter_context(Journal(path)))
            watched = lazy.engine
        else:
            watched = opened.enter_context(opening())
            yield watched
        if watched is None:
            report(role, e, Throughput(), {}, swaps, stage)
        else:
            report(role, e, watched.throughput, retries_of(watched.engine), swaps, stage)


@contextmanager
def bare_engine(
    role: Role,
    e: EngineParams,
    model: str,
    questions: Sequence[Question],
    images: ImageSource | Path,
    swaps: Counter[str],
    name: str | None = None,
) -> Iterator[Engine]:
    """The engine itself, tried out: without journal and watch. name: of its log and in messages, if not the
    role. Raises EngineError."""
    from tasks.served import in_worker, served

    if e.kind == "local":
        from models.engines.local import LocalEngine

        yield LocalEngine.load(model, images, e.capacity)
    elif e.kind == "fake":
        from models.engines.fake import FakeEngine

        yield FakeEngine(batch_size=e.capacity)
    else:
        opened: AbstractContextManager[Engine] = (
            in_worker(name or role, e, model, images)
            if e.kind == "vllm"
            else served(name or role, e, model, images, swaps)
        )
        with opened as engine:
            if questions:
                _try_out(role, engine, questions)
            yield engine


def _judged(role: Role, checkpoint: str | Path, e: EngineParams) -> Path:
    """Where a judge's replies are kept: the same for the stage behind which it judges and for the one whose
    work that is. Those of another judge, or on other data, are dropped."""
    from models.journal import payload_hash
    from tasks.fingerprint import fingerprint

    model = fingerprint(checkpoint) if Path(checkpoint).exists() else None
    key = payload_hash(e.identity, model, fingerprint(DATA))
    home = WORK / "judged" / role
    for other in home.glob("*"):
        if not other.name.startswith(key):
            other.unlink(missing_ok=True)
    return home / f"{key}.journal"


def report(
    role: Role,
    e: EngineParams,
    done: Throughput,
    retries: Mapping[str, int],
    more: Mapping[str, int],
    stage: StageRun,
    engines: int = 1,
) -> None:
    """The throughput on stderr and in MLflow; not in the output, which is to be the same every time.
    engines: so many have done it together."""
    capacity = e.capacity * engines
    line, numbers = done.line(capacity, retries), done.numbers(capacity)
    if not numbers["requests"]:
        line = "not asked: every reply was kept"
    numbers |= {"retries": sum(retries.values()), **more}
    if e.prices is not None:
        numbers["cost"] = done.cost(e.prices)
        line += f", cost about {numbers['cost']:,.2f}"
    print(f"{role}: {line}", file=sys.stderr)
    stage.log_metrics({f"engine/{role}/{name}": value for name, value in numbers.items()})


def retries_of(engine: Engine) -> Mapping[str, int]:
    """What was asked again, by kind."""
    if isinstance(engine, VLLMEngine):
        return engine.retries
    return engine.counters.retries if isinstance(engine, OpenAIEngine) else {}


def _try_out(role: Role, engine: Engine, questions: Sequence[Question]) -> None:
    """The canary, with a question of the stage; what it doubts is said."""
    from models.engines.canary import check
    from models.vlm import Conversation

    first = questions[0]
    images = [] if role in WITHOUT_IMAGES else first.images
    other = next((q.images for q in questions if q.images and q.images != images), [])
    prompt = Conversation(images, [(first.question, "")])

    async def run() -> Findings:
        try:
            return await check(engine, prompt, other if images else [], role in CONSTRAINED)
        finally:
            await engine.close()

    for warning in asyncio.run(run()).warnings:
        print(f"{role}: {warning}", file=sys.stderr)
