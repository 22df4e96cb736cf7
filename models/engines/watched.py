"""An engine that is watched: what it has done, how busy it was, and when too much has failed.

watched = WatchedEngine(engine, ErrorBudget(0.05))
reply = await watched.ask(request)
print(watched.throughput.line(watched.capacity))
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from models.engines.base import Engine, EngineError, Failure, Reply, Request


@dataclass(frozen=True)
class ErrorBudget:
    """How much may fail: `share` of the requests, and `few` of them in any case, so that a bad first minute
    of a long stage does not end it."""

    share: float = 0.05
    few: int = 20

    def exceeded(self, failed: int, asked: int) -> bool:
        """Whether `failed` of `asked` requests are too many."""
        return failed > max(self.few, self.share * asked)

    def check(self, failures: Counter[str], asked: int, last: str) -> None:
        """Raises EngineError when too many of the requests have failed. last: a failure, to be shown."""
        failed = failures.total()
        if self.exceeded(failed, asked):
            raise EngineError(
                f"{failed:,} of {asked:,} requests were given up on, more than the error budget allows "
                f"({self.share:.0%}): {_counted(failures)}. The last one, {last}. What was answered is kept: "
                "put right what causes it, and run again"
            )


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    prompt: float = 0.0
    cached: float = 0.0
    output: float = 0.0


@dataclass
class Throughput:
    """What an engine has done. busy: capacity-seconds in use, so that busy / (capacity * seconds) is its
    utilisation; seconds: from the first request on in which at least one was under way."""

    answered: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    def numbers(self, capacity: int) -> dict[str, float]:
        """As metrics, rates a second."""
        seconds = max(self.seconds, 1e-9)
        return {
            "requests": self.answered + self.failures.total(),
            "requests_per_s": self.answered / seconds,
            "output_tokens_per_s": self.output_tokens / seconds,
            "cached_share": self.cached_tokens / max(self.prompt_tokens, 1),
            "utilisation": self.busy / (capacity * seconds),
            "failures": self.failures.total(),
        }

    def cost(self, prices: Prices) -> float:
        """In the currency of the prices."""
        fresh = self.prompt_tokens - self.cached_tokens
        parts = (
            fresh * prices.prompt + self.cached_tokens * prices.cached + self.output_tokens * prices.output
        )
        return parts / 1e6

    def line(self, capacity: int, retries: Mapping[str, int] | None = None) -> str:
        """One line for people."""
        n = self.numbers(capacity)
        parts = [
            f"{n['requests']:,.0f} requests in {self.seconds:,.0f} s ({n['requests_per_s']:,.1f}/s)",
            f"{n['output_tokens_per_s']:,.0f} output tokens/s",
            f"{n['cached_share']:.0%} of prompt tokens cached",
            f"engine {n['utilisation']:.0%} full",
            f"{_counted(retries or {})} retries",
            f"{_counted(self.failures)} failures",
        ]
        return ", ".join(parts)


def together(parts: Sequence[Throughput], engines: int) -> Throughput:
    """What several engines have done, `engines` of them at a time; the others had died."""
    total = Throughput()
    for part in parts:
        total.answered += part.answered
        total.prompt_tokens += part.prompt_tokens
        total.cached_tokens += part.cached_tokens
        total.output_tokens += part.output_tokens
        total.seconds += part.seconds / engines
        total.busy += part.busy
        total.failures += part.failures
    return total


class WatchedEngine:
    """`engine`, counted; raises EngineError once more has failed than the budget allows. asked: requests so
    far. last_failure: which one, and why."""

    def __init__(
        self,
        engine: Engine,
        budget: ErrorBudget = ErrorBudget(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.budget, self.throughput = engine, budget, Throughput()
        self.capacity, self.independent = engine.capacity, engine.independent
        self.asked, self.last_failure = 0, ""
        self._spent: EngineError | None = None
        self._clock, self._under_way, self._since = clock, 0, 0.0

    async def ask(self, request: Request) -> Reply:
        """Engine.ask, counted."""
        self.asked += 1
        self._count(+1)
        try:
            reply = await self.engine.ask(request)
        finally:
            self._count(-1)
        self._add(request, reply)
        return reply

    async def close(self) -> None:
        """Engine.close."""
        await self.engine.close()

    def _count(self, change: int) -> None:
        """Add the time since the last change, and change the number of requests under way."""
        now, done = self._clock(), self.throughput
        if self._under_way:
            done.seconds += now - self._since
            done.busy += (now - self._since) * min(self._under_way, self.capacity)
        self._since = now
        self._under_way += change

    def _add(self, request: Request, reply: Reply) -> None:
        done = self.throughput
        if not isinstance(reply, Failure):
            done.answered += 1
            done.prompt_tokens += reply.prompt_tokens
            done.cached_tokens += reply.cached_tokens
            done.output_tokens += reply.tokens
            return
        if self._spent:  # what was under way then fails with the same words
            raise EngineError(str(self._spent))
        done.failures[reply.reason] += 1
        self.last_failure = f"{request.key}: {reply.reason} ({reply.detail})"
        try:
            self.budget.check(done.failures, self.asked, self.last_failure)
        except EngineError as error:
            self._spent = error
            raise


def _counted(kinds: Mapping[str, int]) -> str:
    """12 (timeout 10, HTTP 500 2)"""
    total = sum(kinds.values())
    if not total:
        return "0"
    return f"{total:,} ({', '.join(f'{kind} {count:,}' for kind, count in sorted(kinds.items()))})"
