"""A real vLLM: its server launched by us, and its engine in a process of its own, with a checkpoint that has
learnt the step protocol.

    make test                                                            # installs vLLM's CPU build
    VLLM_PYTHON=.venv-vllm/bin/python pytest tests/integration/test_vllm.py

What needs no vLLM is in tests/stages/test_served_engine.py and tests/unit/test_vllm_engine.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from PIL import Image

from models.engines.base import Completion, Engine, Failure, Reply, Request, Sampling
from models.engines.canary import check
from models.engines.local import LocalEngine
from models.engines.openai import OpenAIEngine
from models.engines.vllm import WORKER_DIED
from models.reasoning import Settings, parse_step, step_schema
from models.records import Question, read_jsonl, read_questions
from models.vlm import Conversation
from tasks import generate
from tasks.engines import open_engine
from tasks.stage import StageRun
from tests.support.fake_boards import OVERRIDES, make_workspace
from tests.support.taught import teach

pytestmark = pytest.mark.slow

GENERATOR = Path("artifacts/foundation/generator")
ARGUMENTS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"),
    *("--block-size", "32", "--gpu-memory-utilization", "0.1", "--limit-mm-per-prompt", '{"image": 1}'),
    *("--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "xgrammar"}'),
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
CHAIN = Settings("short", min_steps=2, max_steps=3, max_new_tokens=64, attempts=3, repetition_penalty=1.0)
SERVER, CORE = ["-m", "vllm.entrypoints.openai.api_server"], "VLLM::EngineCore"
"""Of processes: what the first runs, and how the second calls itself."""
NEAR = 1e-3
"""Log-probs that differ by less may stand in any order: sums are taken in another order."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout's root whose generator stands on a server that we launch, and its reasoner in vLLM."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.fail(
            "VLLM_PYTHON is to name the interpreter of an environment that has vLLM: run `make test`, or "
            "`make vllm` and then VLLM_PYTHON=.venv-vllm/bin/python pytest"
        )
    own = {"python": str(Path(python).absolute()), "arguments": ARGUMENTS, "environment": ENVIRONMENT}
    own |= {"capacity": 32, "seeded": False}
    engines = {
        "generator": {"kind": "openai", "launch": True, **own},
        "reasoner": {"kind": "vllm", **own},
    }
    folder = make_workspace(tmp_path_factory.mktemp("vllm"), overrides={**OVERRIDES, "engines": engines})
    teach(folder / GENERATOR)
    with chdir(folder):
        yield folder


def stage(name: str) -> StageRun:
    """A stage that records nothing."""
    folder = Path(".work") / name
    return StageRun(name, folder / "out", folder / "scratch", None)


@dataclass(frozen=True)
class Served:
    """As a stage has it: journalled, and watched, and the client itself."""

    engine: Engine
    watched: Any
    client: OpenAIEngine
    questions: Sequence[Question]
    run: StageRun

    def sample(self, seed: int, questions: int) -> dict[str, Any]:
        """The body of `generate` for the first questions; returns its counts."""
        self.run.out.mkdir(parents=True, exist_ok=True)
        p = generate.Params(questions=questions, samples=2, chain=CHAIN)
        return generate.run(p, seed, self.questions[:questions], self.engine, self.run)


@pytest.fixture(scope="module")
def served(workspace: Path) -> Iterator[Served]:
    """The generator's server, started by open_engine and tried with the canary; and ended."""
    questions = read_questions("data/records.jsonl", split="train", pool="generate")
    run = stage("generate")
    with open_engine("generator", GENERATOR, questions, run) as engine:
        watched = opened(engine)
        yield Served(engine, watched, watched.engine, questions, run)
        assert vllm_processes()
    assert until(lambda: not vllm_processes()), vllm_processes()


def opened(engine: Any) -> Any:
    """What watches it: an engine is opened by the first request that is not kept."""
    ask_all(engine, [asked("Hi.")])
    return engine.engine.engine


def vllm_processes() -> list[psutil.Process]:
    """What descends from this process and belongs to vLLM, or to its watcher."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "vllm" in " ".join(process.cmdline()).lower():
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def killed(when: Callable[[], bool], which: Callable[[psutil.Process], bool]) -> Iterator[None]:
    """SIGKILL for one of vLLM's processes during the block, as soon as it is time."""

    def kill() -> None:
        if until(when):
            next(filter(which, vllm_processes())).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        killer.join()


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether it does in time."""
    deadline = time.monotonic() + timeout_s
    while not (met := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def ask_all(engine: Engine, requests: Sequence[Request]) -> list[Reply]:
    async def run() -> list[Reply]:
        try:
            return await asyncio.gather(*map(engine.ask, requests))
        finally:
            await engine.close()

    return asyncio.run(run())


def asked(text: str, images: Sequence[str] = (), tokens: int = 16, **fields: Any) -> Request:
    prompt = Conversation(list(images), [(text, "")])
    return Request(text[:40], prompt, Sampling(max_new_tokens=tokens), **fields)


def test_the_servers_decoding_is_constrained_and_its_image_seen(served: Served) -> None:
    first = served.questions[0]
    Image.frombytes("RGB", (48, 48), Random(0).randbytes(3 * 48**2)).save("data/images/noise.png")

    async def run() -> Any:
        try:
            prompt = Conversation(first.images, [(first.question, "")])
            return await check(served.client, prompt, ["images/noise.png"])
        finally:
            await served.client.close()

    findings = asyncio.run(run())
    assert findings.constrained and findings.repeatable and findings.image_matters
    assert findings.image_tokens is not None and findings.image_tokens >= 9
    schema = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}
    (date,) = ask_all(served.client, [asked("Say hello.", schema=schema, tokens=40)])
    assert isinstance(date, Completion) and re.fullmatch(r'"\d{4}-\d\d"', date.text)


def test_chains_come_out_step_by_step_and_share_their_prefixes(served: Served) -> None:
    counts = served.sample(seed=0, questions=8)
    assert counts["paths"] + counts["failed"] == 16 and counts["paths"] >= 12
    paths = list(read_jsonl(served.run.out / "paths.jsonl"))
    for path in paths:
        actions = [step["next_action"] for step in path["steps"]]
        assert 2 <= len(actions) <= 3 and actions == ["continue"] * (len(actions) - 1) + ["final_answer"]
        assert path["answer"]
    done = served.watched.throughput
    assert done.cached_tokens > 0.2 * done.prompt_tokens


def test_what_is_journalled_is_not_asked_again(served: Served) -> None:
    served.sample(seed=1, questions=4)
    written, calls = (served.run.out / "paths.jsonl").read_bytes(), served.client.counters.calls
    served.sample(seed=1, questions=4)
    assert (served.run.out / "paths.jsonl").read_bytes() == written
    assert served.client.counters.calls == calls


def test_what_the_server_refuses_fails_alone(served: Served) -> None:
    calls = served.client.counters.calls
    long, odd, good = ask_all(
        served.client, [asked("at length " * 600), asked("x", schema={"type": "no such"}), asked("Hello.")]
    )
    assert isinstance(long, Failure) and long.reason == "HTTP 400" and "512" in long.detail
    assert isinstance(odd, Failure) and odd.reason == "HTTP 400"
    assert isinstance(good, Completion)
    assert served.client.counters.calls == calls + 3


def test_a_server_that_is_killed_midway_is_started_again_and_nothing_is_lost(served: Served) -> None:
    before = served.client.counters.answered
    with killed(lambda: served.client.counters.answered > before + 20, lambda p: p.cmdline()[1:3] == SERVER):
        counts = served.sample(seed=2, questions=12)
    assert counts["paths"] + counts["failed"] == 24
    assert not {"connection error", "HTTP 500", "timeout"} & counts["failures"].keys()
    assert served.client.counters.retries["connection error"] > 0
    written, calls = (served.run.out / "paths.jsonl").read_bytes(), served.client.counters.calls
    served.sample(seed=2, questions=12)
    assert (served.run.out / "paths.jsonl").read_bytes() == written
    assert served.client.counters.calls == calls


def test_vllm_in_a_process_of_its_own_writes_what_the_local_engine_writes_also_after_it_was_killed(
    workspace: Path,
) -> None:
    others = {process.pid for process in vllm_processes()}
    questions = read_questions("data/records.jsonl", split="train", pool="generate")[:12]
    local = LocalEngine.load(GENERATOR, Path("data"), 16)
    opening = [asked(f"{q.question} Step by step:", q.images, 48) for q in questions]
    steps = [reply.text for reply in ask_all(local, opening) if isinstance(reply, Completion)]
    going_on = [after(request, said, "Next.") for request, said in zip(opening, steps, strict=True)]
    free = [*opening, *going_on, asked("Say hello.")]
    schema = step_schema(1, CHAIN)
    with open_engine("reasoner", GENERATOR, questions, stage("sample")) as engine:
        watched = opened(engine)
        before = watched.throughput.answered
        with killed(
            lambda: watched.throughput.answered > before, lambda p: p.name() == CORE and p.pid not in others
        ):
            replies = ask_all(engine, free)
        assert watched.engine.retries[WORKER_DIED] > 0
        held, long, odd = ask_all(
            engine,
            [
                replace(opening[0], key="held", schema=schema),
                asked("at length " * 600),
                asked("x", schema={"type": "no such"}),
            ],
        )
    assert isinstance(held, Completion) and parse_step(held.text).next_action == "continue"
    assert isinstance(long, Failure) and long.reason == "bad request" and "512" in long.detail
    assert isinstance(odd, Failure) and odd.reason == "bad request"
    for request, reply in zip(free, replies, strict=True):
        assert isinstance(reply, Completion)
        assert shortfall(local, request, reply) < NEAR, (request.prompt, reply.text)
    assert sum(reply.cached_tokens for reply in replies if isinstance(reply, Completion)) > 0
    assert until(lambda: {process.pid for process in vllm_processes()} <= others), vllm_processes()


def after(request: Request, said: str, user: str) -> Request:
    """The request for what comes next in the conversation."""
    ((first, _),) = request.prompt.turns
    turns = [(first, said), (user, "")]
    return replace(request, key=f"{request.key} {user}", prompt=replace(request.prompt, turns=turns))


def shortfall(local: LocalEngine, request: Request, reply: Completion) -> float:
    """By how much the log-prob of a token written falls short of that of the local model's first choice, at
    most: 0 where the texts are the same."""
    import torch

    from models.vlm import stack_pixels

    prompt = local.encoder.prompt(request.prompt)
    said = local.encoder.answer_ids(reply.text, goes_on=not reply.finished)
    pixels = stack_pixels(local.encoder, [request.prompt.images]) if request.prompt.images else {}
    with torch.inference_mode():
        logits = local.model(input_ids=torch.tensor([[*prompt, *said]]), **pixels).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    written = log_probs.gather(1, torch.tensor(said)[:, None])[:, 0]
    return float((log_probs.amax(1) - written).max())
