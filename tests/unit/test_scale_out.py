"""Sampling in several actors, without a cluster: the parameters, the blocks, what an actor does, the sums."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.engines.base import Engine, EngineError, Failure, Request, Sampling
from models.engines.fake import FakeEngine
from models.engines.watched import ErrorBudget, Throughput
from models.records import FailedPath, Question, ReasoningPath, Step
from models.vlm import Conversation
from tasks import sampling_actor
from tasks.engines import EngineParams, Params, RayScale, Scale
from tasks.params import ParamsError, parse
from tasks.sampling import Chains
from tasks.sampling_actor import Account, Block, Fault, Sampled, SamplingActor, Work
from tasks.scale_out import Tally, block_size, tried
from tasks.shared_journal import Keeper

QUESTIONS = [Question(f"q{n}", [f"{n // 2}.png"], f"Question {n}?", "7") for n in range(5)]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({}, "key 'ray' is missing"),
        ({"ray": {}}, "key 'actors' is missing"),
        ({"dask": {"actors": 2}}, "unknown key 'dask'"),
        ({"ray": {"actors": 2, "gpu_per_actor": 1}}, "did you mean 'gpus_per_actor'"),
        ({"ray": {"actors": 0}}, "actors: expected 1 or more"),
        ({"ray": {"actors": 1, "gpus_per_actor": 1.5}}, "a share or a whole number"),
        ({"ray": {"actors": 1, "cpus_per_actor": -1}}, "cpus_per_actor: expected 0 or more"),
        ({"ray": {"actors": 1, "object_store_mb": 10}}, "Ray needs 80 or more"),
        ({"ray": {"actors": 1, "address": "ray://head:10001"}}, "ray://head:10001 is for Ray's client"),
    ],
)
def test_a_scale_that_cannot_be_is_named(scale: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        parse({"scale": scale}, EngineParams, "params.yaml: engines.generator")


def test_scale_is_for_roles_that_sample_and_changes_no_text() -> None:
    section = {"kind": "openai", "url": "http://a/v1", "scale": {"ray": {"actors": 4, "gpus_per_actor": 2}}}
    engines = parse({"generator": section, "reasoner": section}, Params, "engines")
    assert engines.generator.scale == Scale(RayScale(4, 2.0))
    assert engines.generator.identity == EngineParams("openai", url="http://a/v1").identity
    with pytest.raises(ParamsError, match="path_judge: scale is for the roles that sample"):
        parse({"path_judge": section}, Params, "engines")
    with pytest.raises(ParamsError, match="linger_s is not for an engine with `scale`"):
        lingering = {**section, "url": None, "launch": True, "linger_s": 9}
        parse({"reasoner": lingering}, Params, "engines")


def test_blocks_keep_an_engine_full_and_leave_work_for_every_actor() -> None:
    two = EngineParams(capacity=256, scale=Scale(RayScale(2)))
    assert block_size(two, 10_000, samples=4) == 48  # 4 blocks of 48 questions of 4 chains: 3 x 256
    assert block_size(two, 10_000, samples=768) == 1
    assert block_size(two, 80, samples=4) == 10 and block_size(two, 1, samples=4) == 1


def test_an_engine_is_tried_out_with_two_images_if_there_are_two() -> None:
    assert tried(QUESTIONS) == [QUESTIONS[0], QUESTIONS[2]]
    assert tried(QUESTIONS[:2]) == QUESTIONS[:1] and tried([]) == []


class Remote:
    """An actor's handle, without Ray: `remote` calls at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Remote:
        self.name = name
        return self

    def remote(self, *arguments: Any) -> Any:
        value = getattr(self.actor, self.name)(*arguments)
        return value if self.name == "enter" else _awaited(value)


async def _awaited(value: Any) -> Any:
    return value


class Dependent(FakeEngine):
    independent = False


async def one_chain(engine: Engine, question: Question, sample: int) -> ReasoningPath | FailedPath:
    sampling = Sampling(seed=sample)
    prompt = Conversation(question.images, [(question.question, "")])
    reply = await engine.ask(Request(f"{question.id}/{sample}/1", prompt, sampling))
    if isinstance(reply, Failure):
        return FailedPath(question.id, sample, reply.reason)
    return ReasoningPath(question.id, sample, [Step("Read", reply.text)], reply.text, "7")


@pytest.fixture
def make_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make_actor(engine, number): an actor whose keeper has a journal in tmp_path."""
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.chdir(tmp_path)

    def make(engine: FakeEngine | EngineError, number: int = 1) -> tuple[SamplingActor, Keeper]:
        @contextmanager
        def opened(*_: Any) -> Iterator[FakeEngine]:
            if isinstance(engine, EngineError):
                raise engine
            yield engine

        monkeypatch.setattr(sampling_actor, "bare_engine", opened)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        keeper = Keeper(tmp_path / "steps.journal")
        keeper.entered = number - 1
        e = EngineParams("fake", scale=Scale(RayScale(2, restarts=3)))
        work = Work("generator", e, "model", tmp_path, "1", QUESTIONS[:1], 2, one_chain, None)
        return SamplingActor(work, Remote(keeper)), keeper

    return make


def sampled(actor: SamplingActor) -> Sampled | Fault:
    block = pickle.dumps(Block(QUESTIONS, "all of them"))
    reply: Sampled | Fault = pickle.loads(asyncio.run(actor({"block": block}))["reply"])
    return reply


@pytest.mark.parametrize("kind", [FakeEngine, Dependent])
def test_an_actor_gives_what_a_stage_without_ray_has_and_asks_nothing_twice(
    make_actor: Any, kind: Any
) -> None:
    def text(request: Request) -> str:
        return f"{request.key} {request.sampling.seed}"

    chains = Chains(kind(text), 2, one_chain, lambda done, work: None, None, None)
    expected: list[Any] = []
    chains.sample(QUESTIONS, 2, expected.append)
    engine = kind(text)
    actor, keeper = make_actor(engine)
    first = sampled(actor)
    assert isinstance(first, Sampled) and first.rows == expected and engine.requests == 10
    assert first.account.asked == 10 and first.account.done.answered == 10
    keeper.close()
    actor, keeper = make_actor(engine, number=2)
    again = sampled(actor)
    assert isinstance(again, Sampled) and again.rows == expected and engine.requests == 10
    keeper.close()


def test_what_an_actor_cannot_do_it_says_in_plain_words(make_actor: Any) -> None:
    actor, keeper = make_actor(EngineError("no server answers at http://a/v1"))
    assert sampled(actor) == Fault("no server answers at http://a/v1")
    keeper.close()
    actor, keeper = make_actor(FakeEngine(), number=6)
    fault = sampled(actor)
    assert isinstance(fault, Fault) and "4 actors have died, more than `restarts` allows (3)" in fault.message
    keeper.close()


def test_one_error_budget_for_all_actors() -> None:
    def account(actor: int, answered: int, failed: int) -> Account:
        done = Throughput(answered, seconds=10.0, busy=20.0, failures=Counter({"timeout": failed}))
        return Account(actor, answered + failed, done, {"HTTP 503": 1}, "q1/0/1: timeout (600 s)")

    tally = Tally(ErrorBudget(0.05), actors=2)
    for late_and_early in (account(1, 100, 11), account(2, 80, 9), account(1, 50, 1)):
        tally.add(late_and_early)
    assert tally.retries == {"HTTP 503": 2} and (tally.engines, tally.replaced) == (2, 0)
    total = tally.throughput
    assert (total.answered, total.failures.total(), total.seconds, total.busy) == (180, 20, 10.0, 40.0)
    with pytest.raises(
        EngineError, match=r"21 of 201 requests .* \(5%\): 21 \(timeout 21\).* q1/0/1: timeout"
    ):
        tally.add(account(3, 0, 1))
    assert tally.replaced == 1


def test_judging_ahead_leaves_a_cluster_alone_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tasks.ahead import judging_ahead

    monkeypatch.chdir(tmp_path)
    judge = "{kind: openai, url: 'http://a/v1', ahead: true}"
    generator = "{kind: fake, scale: {ray: {actors: 2}}}"
    Path("params.yaml").write_text(f"engines: {{path_judge: {judge}, generator: {generator}}}\n")
    with judging_ahead("assess", QUESTIONS, None) as then:  # type: ignore[arg-type]
        assert then is None
    assert "generator samples on a cluster: nothing is judged ahead" in capsys.readouterr().err


def test_ray_is_needed_by_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.cluster import ray_cluster

    code = "import sys, tasks.generate, tasks.sample, tasks.scale_out; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'longview\[ray\]'"), ray_cluster(RayScale(2)):
        pass
