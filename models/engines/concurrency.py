"""Many coroutines at once, their results in order.

async for row in in_order(work, items, at_once=160):
    ...
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8
"""Items begun or done beyond the oldest unfinished one, as a multiple of `at_once`: bounds what is held."""


async def in_order(
    work: Callable[[Item], Awaitable[Result]], items: Iterable[Item], at_once: int
) -> AsyncIterator[Result]:
    """work(item) for every item, `at_once` under way, results in the order of the items. Memory is flat in
    the number of items. The first error ends all that is under way."""
    room = asyncio.Semaphore(at_once)

    async def begin(item: Item) -> Result:
        try:
            return await work(item)
        finally:
            room.release()

    begun: deque[asyncio.Task[Result]] = deque()
    try:
        for item in items:
            await room.acquire()
            begun.append(asyncio.create_task(begin(item)))
            while begun and (begun[0].done() or len(begun) >= AHEAD * at_once):
                yield await begun.popleft()
        while begun:
            yield await begun.popleft()
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
