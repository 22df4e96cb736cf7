"""An engine whose completions are in a journal: what was answered once is not asked again.

kept = JournalledEngine(engine, journal)
reply = await kept.ask(request)
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any, Protocol

import orjson

from models.engines.base import Completion, Engine, Reply, Request


class Journal(Protocol):
    """Where replies are kept (models.journal)."""

    def get(self, key: str) -> dict[str, Any] | None: ...

    def put(self, key: str, value: dict[str, Any]) -> None: ...


class JournalledEngine:
    """`engine`, with a journal before it. What the engine gave up on is not kept: another run asks again."""

    def __init__(self, engine: Engine, journal: Journal) -> None:
        self.engine, self.journal = engine, journal
        self.capacity, self.independent = engine.capacity, engine.independent

    async def ask(self, request: Request) -> Reply:
        """From the journal, or from the engine and then journalled."""
        key = request_key(request)
        if (kept := self.journal.get(key)) is not None:
            return Completion(**kept)
        reply = await self.engine.ask(request)
        if isinstance(reply, Completion):
            self.journal.put(key, dict(vars(reply)))
        return reply

    async def close(self) -> None:
        """Closes the engine; the journal is its opener's."""
        await self.engine.close()


def request_key(request: Request) -> str:
    """What is asked for, and a hash of all that may change the reply."""
    prompt = request.prompt
    payload = [list(prompt.images), list(prompt.turns), vars(request.sampling), request.schema]
    try:
        text = orjson.dumps(payload, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # half a surrogate pair in a prompt
        text = json.dumps(payload, sort_keys=True).encode()
    return f"{request.key}:{blake2b(text, digest_size=12).hexdigest()}"
