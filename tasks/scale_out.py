"""Sampling in several actors on a Ray cluster: the same step loop, the same journal, the same bytes.

    with scaled_out("generator", e, checkpoint, questions, stage) as actors:
        actors.sample(questions, samples, chain, asked, chunk, stop, take, advance)

Ray Data hands blocks of questions to the actors (tasks.sampling_actor), no more than they can have under way
and the memory for results allows, and gives back the chains in order. An actor that dies is started again,
and its blocks are sampled again: what was journalled is not asked again.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.base import EngineError
from models.engines.watched import ErrorBudget, Throughput, together
from models.journal import payload_hash
from models.records import to_json
from tasks.cluster import ray_cluster
from tasks.engines import EngineParams, RayScale, Role, report
from tasks.sampling import AT_ONCE, Chain, Enough, Row
from tasks.sampling_actor import THREADS, Account, Block, Fault, Sampled, SamplingActor, Work
from tasks.shared_journal import shared_journal
from tasks.stage import StageRun

if TYPE_CHECKING:
    from models.records import Question
    from tasks.meter import Advance

BLOCKS_AT_ONCE = 4
"""Blocks that an actor samples at a time: as one ends, the others keep the engine full."""


@contextmanager
def scaled_out(
    role: Role, e: EngineParams, checkpoint: str | Path, questions: Sequence[Question], stage: StageRun
) -> Iterator[ScaledOut]:
    """The actors of a role that has `scale`. Raises EngineError that says what is wrong and what to do."""
    assert e.scale is not None
    scale = e.scale.ray
    with ray_cluster(scale) as ray:
        kept = stage.scratch / (f"{role}.journal" if e.independent else "chains.journal")
        tally = Tally(ErrorBudget(e.error_budget), scale.actors)
        with shared_journal(ray, kept) as keeper:
            yield ScaledOut(ray, keeper, role, e, scale, e.model or str(checkpoint), tally)
    replaced = {"actors_replaced": tally.replaced}
    report(role, e, tally.throughput, tally.retries, replaced, stage, tally.engines)


@dataclass
class Tally:
    """What all actors have done together; raises EngineError once too much of it has failed. actors: how many
    work at a time."""

    budget: ErrorBudget
    actors: int
    accounts: dict[int, Account] = field(default_factory=dict)

    def add(self, account: Account) -> None:
        """The actor's latest account counts; they may come in any order."""
        last = self.accounts.get(account.actor)
        if last is None or _answered(account) >= _answered(last):
            self.accounts[account.actor] = account
        failures = sum((one.done.failures for one in self.accounts.values()), Counter[str]())
        asked = sum(one.asked for one in self.accounts.values())
        self.budget.check(failures, asked, account.last_failure)

    @property
    def engines(self) -> int:
        """How many were at work at a time: fewer than asked for where there was little to do."""
        return min(self.actors, max(1, len(self.accounts)))

    @property
    def throughput(self) -> Throughput:
        return together([account.done for account in self.accounts.values()], self.engines)

    @property
    def retries(self) -> Counter[str]:
        return sum((Counter(account.retries) for account in self.accounts.values()), Counter[str]())

    @property
    def replaced(self) -> int:
        """Actors that have died and were started again."""
        return max(0, max(self.accounts, default=0) - self.actors)


def _answered(account: Account) -> int:
    return account.done.answered + account.done.failures.total()


@dataclass(frozen=True)
class ScaledOut:
    """Stands where an engine would, for `tasks.sampling.sample_chains`."""

    ray: Any
    keeper: Any
    role: Role
    e: EngineParams
    scale: RayScale
    model: str
    tally: Tally

    def sample(
        self,
        questions: Sequence[Question],
        samples: int,
        chain: Chain,
        asked: Any,
        chunk: int,
        stop: Enough | None,
        take: Callable[[Row], None],
        advance: Advance,
    ) -> None:
        """As `sample_chains`. Raises EngineError."""
        threads = os.environ.get(THREADS)
        work = Work(
            self.role, self.e, self.model, Path.cwd(), threads, tried(questions), samples, chain, stop
        )
        size = block_size(self.e, len(questions), samples) if self.e.independent else chunk
        blocks = [
            Block(part, payload_hash([to_json(question) for question in part], samples, asked))
            for part in (list(questions[at : at + size]) for at in range(0, len(questions), size))
        ]
        ended = 0
        for block, sampled in zip(blocks, self._sampled(work, blocks), strict=True):
            for row in sampled.rows:
                take(row)
            self.tally.add(sampled.account)
            ended += len(block.questions) * samples
            advance(ended, ended)

    def _sampled(self, work: Work, blocks: Sequence[Block]) -> Iterator[Sampled]:
        """In order."""
        from ray.exceptions import RayError

        at_once = BLOCKS_AT_ONCE if self.e.independent else 1
        replies = (
            self._data()
            .from_items([{"block": pickle.dumps(block)} for block in blocks], override_num_blocks=len(blocks))
            .map(
                SamplingActor,
                fn_constructor_args=[work, self.keeper],
                compute=self._data().ActorPoolStrategy(
                    size=min(self.scale.actors, len(blocks)),
                    max_concurrent_calls_per_actor=at_once,
                    max_tasks_in_flight_per_actor=2 * at_once,
                ),
                num_cpus=self.scale.cpus_per_actor,
                num_gpus=self.scale.gpus_per_actor,
            )
        )
        try:
            for row in replies.iter_rows():
                reply = pickle.loads(row["reply"])
                if isinstance(reply, Fault):
                    raise EngineError(reply.message)
                yield reply
        except RayError as error:
            raise EngineError(
                f"the actors of {self.role} could not go on (does every node have this Longview?): {error}"
            ) from error

    def _data(self) -> Any:
        """Ray Data, quiet and in order."""
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "progress bars disabled"
        return data


def tried(questions: Sequence[Question]) -> list[Question]:
    """The first question and, if there is one, the first with other images: what a canary needs."""
    others = (q for q in questions if q.images and q.images != questions[0].images)
    return [*questions[:1], *([other] if (other := next(others, None)) else [])]


def block_size(e: EngineParams, questions: int, samples: int) -> int:
    """Questions a block: as many as keep an actor's engine full, if there are enough for all actors."""
    assert e.scale is not None
    under_way = -(-AT_ONCE * e.capacity // samples)
    each = -(-questions // e.scale.ray.actors)
    return max(1, -(-min(under_way, each) // BLOCKS_AT_ONCE))
