"""Running much through engines: in order, with progress, and journalled so that a kill loses little.

    answers = run_all(lambda q: answer_directly(engine, q, "short"), questions, [engine], "questions")
    sample_chains(engine, questions, samples, chain, asked, chunk, scratch, take=rows.append)

What engines said is kept in the stage's scratch folder. Where replies are independent of each other the
engine does that itself, reply by reply (tasks.engines); where they are not, whole chunks of questions are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tasks import engines
from tasks.meter import Advance, meter

if TYPE_CHECKING:
    from models.engines.base import Engine
    from models.records import FailedPath, Question, ReasoningPath
    from tasks.ahead import Ahead
    from tasks.engines import Role
    from tasks.scale_out import ScaledOut
    from tasks.stage import StageRun

Item = TypeVar("Item")
Result = TypeVar("Result")
Chain = Callable[["Engine", "Question", int], Awaitable["ReasoningPath | FailedPath"]]
"""chain(engine, question, sample)"""
Row = dict[str, Any]
"""A ReasoningPath or, with a `reason`, a FailedPath."""

AT_ONCE = 3
"""Chains or items under way, as a multiple of what the engines have room for: the next requests wait in the
engine, also while questions wait for their last chain."""


@dataclass(frozen=True)
class Enough:
    """Of a question so many right and so many wrong chains are enough; no more of its chains are begun."""

    right: int = 1
    wrong: int = 1

    def __post_init__(self) -> None:
        if min(self.right, self.wrong) < 0 or self.right + self.wrong == 0:
            raise ValueError(f"stop: expected numbers of right and wrong chains, found {self}")

    def missing(self, question: Question, outcomes: Sequence[ReasoningPath | FailedPath]) -> int:
        """How many chains must still come, at least. What the rules cannot judge counts as neither."""
        from models.answers import matches

        known = [
            matches(answer_of(outcome), question.answer, question.choices)
            for outcome in outcomes
            if not hasattr(outcome, "reason")
        ]
        return max(0, self.right - known.count(True)) + max(0, self.wrong - known.count(False))


def answer_of(path: Any) -> str:
    """A path's answer; where no answer was asked for, what its last step says."""
    return path.answer or path.steps[-1].content


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
    results: list[Result] = []
    with meter(what, len(items)) as advance:

        def take(result: Result) -> None:
            results.append(result)
            advance(len(results), len(results))

        _run(work, items, engines, at_once, take)
    return results


@contextmanager
def open_sampler(
    role: Role, checkpoint: str | Path, questions: Sequence[Question], stage: StageRun
) -> Iterator[Engine | ScaledOut]:
    """What `sample_chains` asks: the engine of a role, or where the role has `scale` the actors that have it.
    Raises EngineError."""
    e = engines.engine_params(role)
    if e.scale is None:
        with engines.open_engine(role, checkpoint, questions, stage) as engine:
            yield engine
        return
    from tasks.scale_out import scaled_out

    with scaled_out(role, e, checkpoint, questions, stage) as actors:
        yield actors


def sample_chains(
    engine: Engine | ScaledOut,
    questions: Sequence[Question],
    samples: int,
    chain: Chain,
    asked: Any,
    chunk: int,
    scratch: Path,
    take: Callable[[Row], None],
    stop: Enough | None = None,
    then: Ahead | None = None,
) -> None:
    """N chains a question, or fewer where `stop` says that there are enough, given to `take` one after
    another in order of question and sample; replayed after a kill. Memory is flat in the number of chains.

    asked: all that makes the chains what they are, besides the questions; chunk: questions kept together
    where the engine's replies depend on each other; then: what is done with a question whose last chain has
    ended, and awaited.
    """
    from tasks.scale_out import ScaledOut

    with meter("chains", len(questions) * samples) as advance:
        if isinstance(engine, ScaledOut):
            engine.sample(questions, samples, chain, _named(asked, stop), chunk, stop, take, advance)
            return
        chains = Chains(engine, samples, chain, advance, stop, then)
        if engine.independent:
            chains.sample(questions, -(-AT_ONCE * engine.capacity // samples), take)
        else:
            _sample_chunks(chains, questions, _named(asked, stop), chunk, scratch, take)


def _named(asked: Any, stop: Enough | None) -> Any:
    """What names a chunk of chains in the journal, besides the questions."""
    return [asked, stop and stop.__dict__]


class Chains:
    """Samples `samples` chains a question, and shows how many have ended."""

    def __init__(
        self,
        engine: Engine,
        samples: int,
        chain: Chain,
        advance: Advance,
        stop: Enough | None,
        then: Ahead | None,
    ) -> None:
        self.engine, self.samples, self.chain, self.stop, self.then = engine, samples, chain, stop, then
        self._advance, self._ended = advance, 0

    def sample(self, questions: Iterable[Question], at_once: int, take: Callable[[Row], None]) -> None:
        """At most `at_once` questions under way."""
        from models.records import to_json

        def ended(outcomes: Sequence[ReasoningPath | FailedPath]) -> None:
            for outcome in outcomes:
                take(to_json(outcome))
            self.ended(self.samples - len(outcomes))

        asked = [self.engine, *(self.then.engines if self.then else ())]
        _run(self._of_question, questions, asked, at_once, ended)

    async def rows(self, questions: Sequence[Question]) -> list[Row]:
        """The same from code that is asynchronous itself; all questions at once."""
        from models.records import to_json

        outcomes = await asyncio.gather(*map(self._of_question, questions))
        return [to_json(outcome) for of_question in outcomes for outcome in of_question]

    async def _of_question(self, question: Question) -> list[ReasoningPath | FailedPath]:
        """All chains at once; with `stop`, so many as may be enough, and more as long as they are not."""
        outcomes: list[ReasoningPath | FailedPath] = []
        while len(outcomes) < self.samples:
            left = self.samples - len(outcomes)
            begun = min(left, self.stop.missing(question, outcomes)) if self.stop else left
            if not begun:
                break
            first = len(outcomes)
            outcomes += await asyncio.gather(*(self._one(question, first + n) for n in range(begun)))
        if self.then:
            await self.then(question, outcomes)
        return outcomes

    async def _one(self, question: Question, sample: int) -> ReasoningPath | FailedPath:
        outcome = await self.chain(self.engine, question, sample)
        self.ended(1)
        return outcome

    def ended(self, count: int) -> None:
        """So many more."""
        self._ended += count
        self._advance(self._ended, self._ended)


def _sample_chunks(
    chains: Chains,
    questions: Sequence[Question],
    asked: Any,
    chunk: int,
    scratch: Path,
    take: Callable[[Row], None],
) -> None:
    """Whole chunks of questions, each from the journal or sampled and then journalled."""
    from models.journal import Journal, payload_hash
    from models.records import to_json

    with Journal(scratch / "chains.journal") as journal:
        for start in range(0, len(questions), chunk):
            part = questions[start : start + chunk]
            name = payload_hash([to_json(question) for question in part], chains.samples, asked)
            if (kept := journal.get(name)) is not None:
                rows = kept["rows"]
                chains.ended(len(part) * chains.samples)
            else:
                rows = []
                chains.sample(part, len(part), rows.append)
                journal.put(name, {"rows": rows})
                journal.flush()
            for row in rows:
                take(row)


def sample_reasoner(
    engine: Engine | ScaledOut,
    questions: Sequence[Question],
    p: SamplingParams,
    seed: int,
    scratch: Path,
    take: Callable[[Row], None],
    stop: Enough | None = None,
    then: Ahead | None = None,
) -> None:
    """`sample_chains` of a reasoning agent."""
    from models.agents import sample_reasoning
    from models.engines.base import Sampling

    sampling = Sampling(p.temperature, p.top_p, 1.0, p.max_new_tokens, seed)
    sample_chains(
        engine,
        questions,
        p.samples,
        lambda engine, question, sample: sample_reasoning(engine, question, sample, p.prompts, sampling),
        [p.prompts, sampling.__dict__],
        p.chunk,
        scratch,
        take,
        stop,
        then,
    )


def _run(
    work: Callable[[Item], Awaitable[Result]],
    items: Iterable[Item],
    engines: Sequence[Engine],
    at_once: int,
    take: Callable[[Result], None],
) -> None:
    from models.engines.concurrency import in_order

    async def run() -> None:
        try:
            async for result in in_order(work, items, at_once):
                take(result)
        finally:
            for engine in engines:
                await engine.close()

    asyncio.run(run())
