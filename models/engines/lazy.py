"""An engine that is opened when it is first asked: where all that is asked for is kept, none is started.

    with LazyEngine(lambda: some_engine(), capacity=160) as engine:
        reply = await engine.ask(request)       # now it is there

It is opened, and closed, in a thread of its own, while the event loop goes on: what it starts ends with the
thread that has started it (models.engines.process).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from models.engines.base import Engine, EngineError, Reply, Request

Opened = TypeVar("Opened", bound=Engine)


class LazyEngine(Generic[Opened]):
    """Stands before the engine that `opening` gives, whose replies must be independent of each other.

    engine: None as long as it was not asked.
    """

    independent = True

    def __init__(self, opening: Callable[[], AbstractContextManager[Opened]], capacity: int) -> None:
        self.capacity, self._opening = capacity, opening
        self.engine: Opened | None = None
        self._found: Future[Opened] = Future()
        self._found.set_running_or_notify_cancel()  # nobody who waits can cancel it for the others
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    async def ask(self, request: Request) -> Reply:
        """Engine.ask. Raises what opening it has raised, again for every request."""
        if self.engine is None:
            if self._thread is None:
                self._thread = threading.Thread(target=self._hold, name="engine", daemon=True)
                self._thread.start()
            self.engine = await asyncio.wrap_future(self._found)
        return await self.engine.ask(request)

    async def close(self) -> None:
        """Engine.close, of one that is open."""
        if self.engine is not None:
            await self.engine.close()

    def __enter__(self) -> LazyEngine[Opened]:
        return self

    def __exit__(self, *_: object) -> None:
        """Close it. Nobody waits for one that is still being opened: its thread closes it then, or our
        process's end does."""
        self._leave.set()
        if self._thread is not None and self._found.done():
            self._thread.join()

    def _hold(self) -> None:
        """The thread's whole life."""
        try:
            with self._opening() as engine:
                self._found.set_result(engine)
                self._leave.wait()
        except BaseException as error:
            if self._found.done():
                raise
            self._found.set_exception(EngineError(str(error)) if isinstance(error, EngineError) else error)
