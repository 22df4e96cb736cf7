"""Results in order, never more under way than asked for, an error ends the rest."""

from __future__ import annotations

import asyncio
import random

import pytest

from models.engines.concurrency import AHEAD, in_order


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_results_stand_in_the_order_of_the_items(at_once: int) -> None:
    under_way: list[int] = []
    most = 0

    async def work(item: int) -> int:
        nonlocal most
        under_way.append(item)
        most = max(most, len(under_way))
        for _ in range(1 + random.Random(item).randrange(9)):
            await asyncio.sleep(0)
        under_way.remove(item)
        return item * item

    async def run() -> list[int]:
        return [result async for result in in_order(work, range(50), at_once)]

    assert asyncio.run(run()) == [n * n for n in range(50)]
    assert most == min(at_once, 50)


def test_one_that_hangs_holds_up_a_bounded_number() -> None:
    begun: list[int] = []

    async def run() -> None:
        release = asyncio.Event()

        async def work(item: int) -> int:
            begun.append(item)
            if item == 0:
                await release.wait()
            return item

        async def read() -> int:
            return len([result async for result in in_order(work, range(10_000), 4)])

        reading = asyncio.create_task(read())
        for _ in range(5_000):
            await asyncio.sleep(0)
        assert len(begun) == AHEAD * 4
        release.set()
        assert await reading == 10_000

    asyncio.run(run())


def test_an_error_is_raised_in_its_place_and_ends_what_is_under_way() -> None:
    ended: list[int] = []

    async def work(item: int) -> int:
        if item == 3:
            await asyncio.sleep(0.01)
            raise ValueError("three")
        try:
            if item > 3:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(item)
            raise
        return item

    async def run() -> None:
        seen = []
        with pytest.raises(ValueError, match="three"):
            async for result in in_order(work, range(10), 4):
                seen.append(result)
        assert seen == [0, 1, 2]

    asyncio.run(run())
    assert ended
