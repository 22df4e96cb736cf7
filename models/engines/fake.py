"""An engine without a model, for unit tests and dry runs: answers by a
function of the prompt, and counts calls.

    python -c "from models.engines.fake import FakeEngine; from models.engines.base import *; \
        print(FakeEngine().generate([Conversation([], [('Hello?', '')])], Sampling()))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.engines.base import Completion, Sampling
from models.vlm import Conversation

ONE_STEP = '{"title":"Answer","content":"it is 7","next_action":"final_answer"}'


class FakeEngine:
    """`reply` maps (conversation, sampling) to a text; by default a chain of one step."""

    def __init__(
        self, reply: Callable[[Conversation, Sampling], str] | None = None, batch_size: int = 256
    ) -> None:
        self.reply = reply or (lambda conversation, sampling: ONE_STEP)
        self.batch_size = batch_size
        self.requests = 0
        self.on_ended: Callable[[int], None] = lambda texts: None

    def generate(self, prompts: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        """One reply a prompt; a word counts as a token."""
        self.requests += len(prompts)
        texts = [self.reply(prompt, sampling) for prompt in prompts]
        self.on_ended(len(texts))
        return [Completion(text, len(text.split()), True) for text in texts]
