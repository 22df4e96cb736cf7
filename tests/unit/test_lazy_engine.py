"""An engine that is opened when it is first asked: pytest tests/unit/test_lazy_engine.py."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from models.engines.base import EngineError, Request, Sampling
from models.engines.fake import FakeEngine
from models.engines.lazy import LazyEngine
from models.vlm import Conversation

ASKED = [Request(str(n), Conversation([], [("Sum?", "")]), Sampling()) for n in range(5)]


class Opening:
    """Gives a FakeEngine, or raises; notes in which threads."""

    def __init__(self, error: Exception | None = None, after_s: float = 0.05) -> None:
        self.error, self.after_s = error, after_s
        self.opened: list[threading.Thread] = []
        self.closed: list[threading.Thread] = []

    @contextmanager
    def __call__(self) -> Iterator[FakeEngine]:
        self.opened.append(threading.current_thread())
        time.sleep(self.after_s)
        if self.error:
            raise self.error
        yield FakeEngine()
        self.closed.append(threading.current_thread())


async def ask_all(engine: LazyEngine[FakeEngine]) -> list[object]:
    try:
        return await asyncio.gather(*map(engine.ask, ASKED), return_exceptions=True)
    finally:
        await engine.close()


def test_it_is_opened_once_and_closed_by_the_thread_that_opened_it() -> None:
    opening = Opening()
    with LazyEngine(opening, capacity=2) as engine:
        first, second = asyncio.run(ask_all(engine)), asyncio.run(ask_all(engine))
        assert first == second and len(first) == 5 and not opening.closed
    assert opening.opened == opening.closed and opening.opened[0] is not threading.current_thread()


def test_never_asked_it_is_not_opened() -> None:
    opening = Opening()
    with LazyEngine(opening, capacity=2) as engine:
        asyncio.run(engine.close())
    assert engine.engine is None and not opening.opened


def test_why_it_could_not_be_opened_is_told_to_every_request() -> None:
    opening = Opening(EngineError("no such model"))
    with LazyEngine(opening, capacity=2) as engine:
        for _ in range(2):
            replies = asyncio.run(ask_all(engine))
            assert [str(reply) for reply in replies] == ["no such model"] * 5
    assert len(opening.opened) == 1


def test_leaving_while_it_is_opened_waits_for_nobody_and_leaves_nothing_open() -> None:
    opening = Opening(after_s=0.5)

    async def ask_and_leave() -> None:
        await asyncio.wait_for(engine.ask(ASKED[0]), 0.1)

    began = time.monotonic()
    with LazyEngine(opening, capacity=2) as engine, pytest.raises(TimeoutError):
        asyncio.run(ask_and_leave())
    assert time.monotonic() - began < 0.4
    opening.opened[0].join(5)
    assert opening.closed == opening.opened
