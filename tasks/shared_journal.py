"""A stage's journal for actors in other processes and on other nodes: one actor on the stage's node keeps it.

    with shared_journal(ray, stage.scratch / "generator.journal") as keeper:
        ...
    journal = BlockJournal(keeper, await keeper.steps_of.remote(["q1", "q2"]))   # in an actor

A journal has one writer (models.journal), on a local disk. What an actor is about to need it gets at once, a
block of questions at a time; what it has is sent as soon as the last lot has arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.engines.base import EngineError

PATIENCE_S = 20.0
"""For the keeper of a stage that was killed: it may live a moment longer and hold the journal."""
CLOSING_S = 30.0


class Keeper:
    """The actor that has the journal open."""

    def __init__(self, path: Path) -> None:
        from models.journal import Journal, JournalError

        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.journal = Journal(path)
                break
            except JournalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self.entered = 0

    def enter(self) -> int:
        """A number for one more actor, from 1."""
        self.entered += 1
        return self.entered

    def steps_of(self, records: list[str]) -> dict[str, dict[str, Any]]:
        """What is known of these records."""
        return {key: step for record in records for key, step in self.journal.steps_of(record).items()}

    def get(self, key: str) -> dict[str, Any] | None:
        """Journal.get."""
        return self.journal.get(key)

    def put(self, steps: Mapping[str, Mapping[str, Any]], durably: bool = False) -> None:
        """Journal.put of each; durably: returns when they are."""
        for key, step in steps.items():
            self.journal.put(key, step)
        if durably:
            self.journal.flush()

    def close(self) -> None:
        """Make durable what was put."""
        self.journal.close()


@contextmanager
def shared_journal(ray: Any, path: Path) -> Iterator[Any]:
    """A handle of the keeper, which has the journal open. If it dies it is started again, and what it was
    asked meanwhile waits. Raises EngineError."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Keeper)
    keeper = actor.remote(path.absolute())
    try:
        ray.get(keeper.__ray_ready__.remote())
    except RayError as error:
        raise EngineError(f"{path} could not be opened: {str(error).splitlines()[-1]}") from error
    try:
        yield keeper
    except BaseException:
        with suppress(RayError):
            ray.get(keeper.close.remote(), timeout=CLOSING_S)
        raise
    ray.get(keeper.close.remote(), timeout=CLOSING_S)


class BlockJournal:
    """What JournalledEngine needs, for one block of questions. known: their steps."""

    def __init__(self, keeper: Any, known: dict[str, dict[str, Any]]) -> None:
        self.keeper, self.known = keeper, known
        self._waiting: dict[str, dict[str, Any]] = {}
        self._sending: asyncio.Task[None] | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        """Journal.get."""
        return self.known.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Send it soon. Raises what sending the last ones has raised."""
        self._waiting[key] = value
        if self._sending is not None and self._sending.done():
            self._sending.result()
            self._sending = None
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    async def sent(self) -> None:
        """Wait until all that was put is with the keeper."""
        if self._sending is not None:
            await self._sending

    async def _send(self) -> None:
        while self._waiting:
            steps, self._waiting = self._waiting, {}
            await self.keeper.put.remote(steps)
