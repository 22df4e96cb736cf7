"""The one interface behind which text is generated: the step loop, the judges and the agents know only this.

python -c "from models.engines.base import Sampling; print(Sampling(temperature=0.7, top_p=0.95))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.vlm import Conversation


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. temperature 0 is greedy. seed: fixes the draw of a call as a whole."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What came back for one prompt; `finished` is False when max_new_tokens cut it off."""

    text: str
    tokens: int
    finished: bool


class EngineError(RuntimeError):
    """The engine could not answer; the message says what to do."""


class Engine(Protocol):
    """Answers prompts in batches. The last turn of every conversation is open
    (its assistant text is empty). on_ended(texts): told how many texts have ended since it was told last."""

    batch_size: int
    on_ended: Callable[[int], None]

    def generate(self, prompts: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in order. The same prompts and sampling give the same texts."""
        ...
