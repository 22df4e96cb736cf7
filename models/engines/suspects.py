"""Which request kills an engine, of all that were under way when it died.

    suspects = Suspects()
    suspects.died({1: "one prompt", 2: "another"})  # 1 is to be asked alone, then 2; nothing beside them
    suspects.died({1: "one prompt"})
    suspects.is_deadly("one prompt")

Two-stage group testing (Dorfman 1943, The Detection of Defective Members of Large Populations): n suspects
are asked in groups of sqrt(n), one group at a time, and those of a group with which it dies again one by one.
One deadly request among 256 costs three deaths; by halves it would cost nine, singly 256 replies in a row.
Groups that are answered go before those in doubt: they prove that the engine works.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping

from models.engines.base import Failure, Request

RESTARTS = 4
"""How often an engine may die in a row without an answer, and, added to that, without a request to blame."""
FEW = 8
"""So many suspects are asked one by one at once: that takes less time than another death."""
KILLED = Failure("killed the engine", "it died again when asked nothing but this prompt")


class Suspects:
    """What is known about the deaths of one engine. Requests go by numbers, which are not used again.

    A prompt that was named stays deadly: the samples of one question would each kill the engine again.
    fruitless: deaths since the last answer. unexplained: those that no request was found guilty of.
    """

    def __init__(self) -> None:
        self.fruitless = self.unexplained = 0
        self._groups: deque[set[int]] = deque()
        self._deadly: set[Hashable] = set()
        self._named = False

    @property
    def hopeless(self) -> bool:
        """Whether it is the engine rather than a request."""
        return self.fruitless + self.unexplained > RESTARTS

    def is_deadly(self, prompt: Hashable) -> bool:
        """Whether the engine died of it."""
        return prompt in self._deadly

    def may_ask(self, number: int) -> bool:
        """Whether it is its turn; a request that is no suspect waits until there are none."""
        return not self._groups or number in self._groups[0]

    def died(self, under_way: Mapping[int, Hashable]) -> None:
        """The engine has died; under_way: the prompts of what it had been asked and had not answered."""
        if not self._groups:
            self.fruitless += bool(under_way)
            self.unexplained += not under_way
            self._groups.extend(_groups(under_way))
            return
        self.fruitless += 1
        group = self._groups[0]
        if group.isdisjoint(under_way):
            return
        if len(group) > 1:
            self._groups.popleft()
            self._groups.extend({number} for number in sorted(group))
            return
        (culprit,) = group
        self._deadly.add(under_way[culprit])
        self._named = True
        self.left(culprit)

    def left(self, number: int, answered: bool = False) -> bool:
        """A request has been answered, or is not asked again. Returns whether others may be asked now."""
        if answered:
            self.fruitless = 0
        if not self._groups:
            return False
        first = self._groups[0]
        for group in self._groups:
            group.discard(number)
        self._groups = deque(filter(None, self._groups))
        if not self._groups:
            self.unexplained += not self._named
            self._named = False
        return not first


def prompt_of(request: Request) -> Hashable:
    """What makes two requests the same to an engine that dies of them."""
    prompt = request.prompt
    return tuple(prompt.images), tuple(map(tuple, prompt.turns))


def _groups(under_way: Mapping[int, Hashable]) -> list[set[int]]:
    """Requests with the same prompt stand side by side: few groups die of one prompt."""
    first: dict[Hashable, int] = {}
    numbers = sorted(under_way, key=lambda number: (first.setdefault(under_way[number], number), number))
    size = math.isqrt(len(numbers)) if len(numbers) > FEW else 1
    return [set(numbers[start : start + size]) for start in range(0, len(numbers), size)]
