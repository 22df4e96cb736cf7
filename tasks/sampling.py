"""Sampling chains from a reasoning agent, journalled chunk by chunk, and counting texts as they end.

from tasks.sampling import counting, sample_in_chunks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from models.engines.base import Engine
    from models.records import Question


class SamplingParams(Protocol):
    """What a stage that samples has in its (frozen) parameters."""

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


@contextmanager
def counting(engines: Sequence[Engine], advance: Callable[[int], None], done: int = 0) -> Iterator[None]:
    """While the body runs, advance(texts) with `done` and what the engines have ended since."""
    ended = done

    def more(rows: int) -> None:
        nonlocal ended
        ended += rows
        advance(ended)

    for engine in engines:
        engine.on_ended = more
    try:
        yield
    finally:
        for engine in engines:
            engine.on_ended = lambda rows: None


def sample_in_chunks(
    engine: Engine,
    questions: Sequence[Question],
    p: SamplingParams,
    seed: int,
    scratch: Path,
    advance: Callable[[int, float], None],
) -> list[dict[str, Any]]:
    """N chains a question as rows (ReasoningPath or, with a `reason`, FailedPath),
    in order; replayed after a kill."""
    from models.agents import sample_reasoning
    from models.engines.base import Sampling
    from models.journal import Journal, key
    from models.records import to_json

    journal = Journal(scratch / "journal.jsonl")
    rows: list[dict[str, Any]] = []
    for start in range(0, len(questions), p.chunk):
        chunk = questions[start : start + p.chunk]
        sampling = Sampling(p.temperature, p.top_p, 1.0, p.max_new_tokens, seed * 1_000_003 + start)
        asked = key([to_json(q) for q in chunk], p.samples, p.prompts, sampling.__dict__)

        def work(chunk: Sequence[Question] = chunk, sampling: Sampling = sampling) -> list[dict[str, Any]]:
            return [to_json(row) for row in sample_reasoning(engine, chunk, p.samples, p.prompts, sampling)]

        with counting([engine], lambda ended: advance(ended, ended), len(rows)):
            rows += journal.once(asked, work)
        advance(len(rows), len(rows))
    return rows
