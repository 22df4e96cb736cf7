"""What an actor does for a stage that samples on a cluster (tasks.scale_out): it opens the engine once,
and runs the step loop over the blocks of questions that it is given, several of them at a time.

    dataset.map(SamplingActor, fn_constructor_args=[work, keeper], ...)

What goes in and out are bytes, so that Ray's tables see no record of ours.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.base import EngineError
from models.engines.journalled import JournalledEngine
from models.engines.watched import ErrorBudget, Throughput, WatchedEngine
from models.journal import JournalError
from tasks.engines import DATA, EngineParams, Role, bare_engine, retries_of
from tasks.sampling import Chain, Chains, Enough, Row
from tasks.shared_journal import BlockJournal

if TYPE_CHECKING:
    from models.records import Question

THREADS = "OMP_NUM_THREADS"
UNLIMITED = ErrorBudget(share=1.0)
"""Failures are counted over all actors, by the stage."""


@dataclass(frozen=True)
class Work:
    """What an actor is to do. root: the checkout, in which every node finds data and checkpoints. threads: of
    the stage (OMP_NUM_THREADS), on which the texts of a local engine depend. tried: the questions with which
    an engine is tried out."""

    role: Role
    engine: EngineParams
    model: str
    root: Path
    threads: str | None
    tried: list[Question]
    samples: int
    chain: Chain
    stop: Enough | None


@dataclass(frozen=True)
class Block:
    """Questions that are sampled together. name: of their chains in the journal, if kept as one."""

    questions: list[Question]
    name: str


@dataclass(frozen=True)
class Account:
    """What an actor has done so far."""

    actor: int
    asked: int
    done: Throughput
    retries: Mapping[str, int]
    last_failure: str


@dataclass(frozen=True)
class Sampled:
    """The chains of a block, in order of question and sample."""

    rows: list[Row]
    account: Account


@dataclass(frozen=True)
class Fault:
    """Why an actor cannot go on."""

    message: str


class SamplingActor:
    """An engine, and what samples with it. A fault is returned and not raised: the stage says what it is in
    its own words, not in a traceback through Ray."""

    def __init__(self, work: Work, keeper: Any) -> None:
        import ray

        self.work, self.keeper = work, keeper
        self.number: int = ray.get(keeper.enter.remote())
        self.fault: Fault | None = None
        self._opened = ExitStack()
        try:
            self.engine = self._open()
        except Exception as error:
            self.fault = Fault(_message(error))

    async def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """A Block as bytes to Sampled or Fault as bytes."""
        reply = self.fault or await self._sampled(pickle.loads(row["block"]))
        return {"reply": pickle.dumps(reply)}

    def _open(self) -> WatchedEngine:
        work = self.work
        assert work.engine.scale is not None
        scale = work.engine.scale.ray
        if self.number > scale.actors + scale.restarts:
            raise EngineError(
                f"{self.number - scale.actors} actors have died, more than `restarts` allows "
                f"({scale.restarts}), often for want of memory. What was answered is kept: run again"
            )
        if not work.root.is_dir():
            raise EngineError(
                f"{os.uname().nodename} has no {work.root}: every node needs the checkout at the same place"
            )
        os.chdir(work.root)
        os.environ.pop(THREADS, None)  # Ray's, by the CPUs of the actor
        if work.threads is not None:
            os.environ[THREADS] = work.threads
        name = f"{work.role}-{self.number}"
        opening = bare_engine(work.role, work.engine, work.model, work.tried, DATA, Counter(), name)
        return WatchedEngine(self._opened.enter_context(opening), UNLIMITED)

    async def _sampled(self, block: Block) -> Sampled | Fault:
        try:
            rows = await (self._by_step(block) if self.engine.independent else self._whole(block))
        except Exception as error:
            return Fault(_message(error))
        engine = self.engine
        retries = dict(retries_of(engine.engine))
        return Sampled(
            rows, Account(self.number, engine.asked, engine.throughput, retries, engine.last_failure)
        )

    async def _by_step(self, block: Block) -> list[Row]:
        """Every reply is journalled."""
        known = await self.keeper.steps_of.remote([question.id for question in block.questions])
        journal = BlockJournal(self.keeper, known)
        rows = await self._chains(JournalledEngine(self.engine, journal)).rows(block.questions)
        await journal.sent()
        return rows

    async def _whole(self, block: Block) -> list[Row]:
        """The block is journalled as a whole, and alone with the engine."""
        kept = await self.keeper.get.remote(block.name)
        if kept is None:
            kept = {"rows": await self._chains(self.engine).rows(block.questions)}
            await self.engine.close()
            await self.keeper.put.remote({block.name: kept}, True)
        return list(kept["rows"])

    def _chains(self, engine: JournalledEngine | WatchedEngine) -> Chains:
        work = self.work
        return Chains(engine, work.samples, work.chain, lambda done, work, said="": None, work.stop, None)


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, EngineError | JournalError) else traceback.format_exc()
