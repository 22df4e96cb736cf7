"""An engine without a model, for unit tests and dry runs: answers by a function of the request, and counts.

    python -c "from models.engines.fake import FakeEngine; from models.engines.base import *; \
        print(generate(FakeEngine(), [Conversation([], [('Hello?', '')])], Sampling()))"
"""

from __future__ import annotations

from collections.abc import Callable

from models.engines.base import Completion, Reply, Request

ONE_STEP = '{"title":"Answer","content":"it is 7","next_action":"final_answer"}'


class FakeEngine:
    """`reply` maps a request to a text; by default a chain of one step."""

    independent = True

    def __init__(self, reply: Callable[[Request], str] | None = None, batch_size: int = 256) -> None:
        self.reply = reply or (lambda request: ONE_STEP)
        self.capacity = batch_size
        self.requests = 0

    async def ask(self, request: Request) -> Reply:
        """At once; a word counts as a token."""
        self.requests += 1
        text = self.reply(request)
        return Completion(text, len(text.split()), True)

    async def close(self) -> None:
        """Holds nothing."""
