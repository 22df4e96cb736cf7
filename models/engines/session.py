"""What an engine has in one event loop: room for so many requests, and the tasks that wait for a reply.

session = Session(capacity=160)
reply = await session.answer(request, lambda: ask_the_server(request))
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from models.engines.base import Reply, Request


class Session:
    """Made in the event loop that it belongs to."""

    def __init__(self, capacity: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.room = asyncio.Semaphore(capacity)
        self.under_way: set[asyncio.Task[Any]] = set()

    async def answer(self, request: Request, ask: Callable[[], Awaitable[Reply]]) -> Reply:
        """What `ask` returns, called as soon as there is room. Raises ValueError for a prompt whose last turn
        is answered, RuntimeError in another event loop."""
        if request.prompt.turns[-1][1]:
            raise ValueError("the last turn of a prompt must be open (empty answer)")
        task = asyncio.current_task()
        assert task is not None
        if self.loop is not task.get_loop():
            raise RuntimeError("close() the engine in one event loop before it is used in another")
        self.under_way.add(task)
        try:
            async with self.room:
                return await ask()
        finally:
            self.under_way.discard(task)

    async def end(self) -> None:
        """Cancels the tasks that wait; returns when no request is under way."""
        for task in self.under_way:
            task.cancel()
        while self.under_way:
            await asyncio.sleep(0)
