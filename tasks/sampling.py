"""Running much through engines: in order, with progress, and journalled so that a kill loses little.

    answers = run_all(lambda q: answer_directly(engine, q, "short"), questions, [engine], "questions")
    rows = sample_chains(engine, questions, samples, chain, asked, chunk, scratch)

What engines said is kept in the stage's scratch folder. Where replies are independent of each other the
engine does that itself, reply by reply (tasks.engines); where they are not, whole chunks of questions are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tasks.meter import meter

if TYPE_CHECKING:
    from models.engines.base import Engine
    from models.records import FailedPath, Question, ReasoningPath

Item = TypeVar("Item")
Result = TypeVar("Result")
Chain = Callable[["Engine", "Question", int], Awaitable["ReasoningPath | FailedPath"]]
"""chain(engine, question, sample)"""

AT_ONCE = 2
"""Items under way, as a multiple of what the engines have room for: the next requests wait in the engine."""


class SamplingParams(Protocol):
    """What a stage that samples a reasoning agent has in its (frozen) parameters."""

    @property
    def prompts(self) -> str: ...

    @property
    def samples(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def chunk(self) -> int: ...


def run_all(
    work: Callable[[Item], Awaitable[Result]], items: Sequence[Item], engines: Sequence[Engine], what: str
) -> list[Result]:
    """work(item) for all, results in order. what: the items' name in the progress line."""
    at_once = AT_ONCE * max((engine.capacity for engine in engines), default=1)
    with meter(what, len(items)) as advance:
        return _run(work, items, engines, at_once, lambda done: advance(done, done))


def sample_chains(
    engine: Engine,
    questions: Sequence[Question],
    samples: int,
    chain: Chain,
    asked: Any,
    chunk: int,
    scratch: Path,
) -> list[dict[str, Any]]:
    """N chains a question as rows (ReasoningPath or, with a `reason`, FailedPath), in order of question and
    sample; replayed after a kill.

    asked: all that makes the chains what they are, besides the questions; chunk: questions kept together
    where the engine's replies depend on each other.
    """
    from models.journal import Journal, payload_hash
    from models.records import to_json

    rows: list[dict[str, Any]] = []

    def run(part: Sequence[Question], at_once: int) -> list[dict[str, Any]]:
        pairs = [(question, sample) for question in part for sample in range(samples)]
        outcomes = _run(
            lambda pair: chain(engine, *pair),
            pairs,
            [engine],
            at_once,
            lambda done: advance(len(rows) + done, len(rows) + done),
        )
        return [to_json(outcome) for outcome in outcomes]

    with Journal(scratch / "chains.journal") as journal, meter("chains", len(questions) * samples) as advance:
        if engine.independent:
            return run(questions, AT_ONCE * engine.capacity)
        for start in range(0, len(questions), chunk):
            part = questions[start : start + chunk]
            name = payload_hash([to_json(question) for question in part], samples, asked)
            kept = journal.get(name)
            if kept is None:
                kept = {"rows": run(part, len(part) * samples)}
                journal.put(name, kept)
                journal.flush()
            rows += kept["rows"]
            advance(len(rows), len(rows))
    return rows


def sample_reasoner(
    engine: Engine, questions: Sequence[Question], p: SamplingParams, seed: int, scratch: Path
) -> list[dict[str, Any]]:
    """`sample_chains` of a reasoning agent."""
    from models.agents import sample_reasoning
    from models.engines.base import Sampling

    sampling = Sampling(p.temperature, p.top_p, 1.0, p.max_new_tokens, seed)
    return sample_chains(
        engine,
        questions,
        p.samples,
        lambda engine, question, sample: sample_reasoning(engine, question, sample, p.prompts, sampling),
        [p.prompts, sampling.__dict__],
        p.chunk,
        scratch,
    )


def _run(
    work: Callable[[Item], Awaitable[Result]],
    items: Sequence[Item],
    engines: Sequence[Engine],
    at_once: int,
    done: Callable[[int], None],
) -> list[Result]:
    from models.engines.concurrency import in_order

    async def run() -> list[Result]:
        results: list[Result] = []
        try:
            async for result in in_order(work, items, at_once):
                results.append(result)
                done(len(results))
        finally:
            for engine in engines:
                await engine.close()
        return results

    return asyncio.run(run())
