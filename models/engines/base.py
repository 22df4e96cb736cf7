"""The one interface behind which text is generated: the step loop, the judges and the agents know only this.

python -c "from models.engines.base import Sampling; print(Sampling(temperature=0.7, top_p=0.95))"
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from models.vlm import Conversation


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. temperature 0 is greedy. seed: fixes the draws of one request, whatever others are
    under way with it."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One open prompt on its way to an engine.

    key: what is asked for (record, sample, step); unique among the requests under way. schema: the JSON
    schema that the text must follow, where the engine can constrain its decoding. goes_on: a later prompt
    begins with this one and its text, so that what was computed for them is worth keeping. log_probs: the
    completion is to be a Scored; only vLLM can.
    """

    key: str
    prompt: Conversation
    sampling: Sampling
    schema: Mapping[str, Any] | None = None
    goes_on: bool = False
    log_probs: bool = False


@dataclass(frozen=True)
class Completion:
    """What came back for one prompt; `finished` is False when max_new_tokens cut it off.

    tokens: new ones; cached_tokens: those of the prompt that the engine had met before.
    """

    text: str
    tokens: int
    finished: bool
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Scored(Completion):
    """A completion with (token id, log-prob) of every token of its prompt but the first."""

    prompt_log_probs: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Failure:
    """A request given up on. reason: short and countable ("timeout", "HTTP 400"); detail: a line to show."""

    reason: str
    detail: str = ""


Reply = Completion | Failure


class EngineError(RuntimeError):
    """The engine as a whole cannot answer; the message says what to do."""


class Engine(Protocol):
    """Answers requests, as many at once as it has room for. The last turn of every prompt is open (its
    assistant text is empty). Used from one event loop at a time.

    capacity: requests under way at which nothing in the engine stands idle; more may be asked, and wait.
    independent: whether a reply depends on its own request alone. Where it also depends on what is decoded
    beside it (rounding differs with the shape of a batch), a run that is to end with the same bytes after a
    kill repeats whole chunks of work.
    """

    capacity: int
    independent: bool

    async def ask(self, request: Request) -> Reply:
        """The reply to one request. Raises EngineError when the engine as a whole cannot answer."""
        ...

    async def close(self) -> None:
        """Give back what belongs to the event loop: connections, requests under way. Idempotent."""
        ...


def generate(engine: Engine, prompts: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
    """One completion a prompt, in order, each with a seed of its own that `sampling.seed` fixes; from code
    that is not asynchronous itself.

    Raises EngineError for a prompt that the engine gave up on.
    """

    async def ask(number: int, prompt: Conversation) -> Completion:
        seed = derived_seed(sampling.seed, number)
        reply = await engine.ask(Request(str(number), prompt, replace(sampling, seed=seed)))
        if isinstance(reply, Failure):
            raise EngineError(f"request {number} was given up on: {reply.reason} ({reply.detail})")
        return reply

    async def ask_all() -> list[Completion]:
        try:
            return await asyncio.gather(*(ask(n, prompt) for n, prompt in enumerate(prompts)))
        finally:
            await engine.close()

    return asyncio.run(ask_all())


def derived_seed(*parts: int | str) -> int:
    """A seed of 63 bits from what tells a draw from all others: the run's seed, the record, the sample, …"""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
