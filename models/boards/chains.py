"""Chains of reasoning on boards: how a teacher would think aloud, in four strategies of growing care.

    python -c "import numpy as np; from models.boards import chains, questions as q; \
        print(chains.chain(q.ask(np.random.default_rng(1)), 'detailed'))"

The generator learns all four, so that what it samples differs in strategy and not only in noise
(METHOD 1.1: the paper's prompt asks for alternatives and re-examination).
"""

from __future__ import annotations

import numpy as np

from models.boards.questions import BoardQuestion, running_sum
from models.records import Step

STRATEGIES = ("glance", "brief", "detailed", "checked")
"""glance: a guess at once; brief: reads, then a guess; detailed:
every read worked out; checked: and once more (a single read is not read twice)."""

TERSENESS = {
    "read": 0.90,
    "where": 0.70,
    "compare": 0.70,
    "order": 0.70,
    "parity": 0.70,
    "largest": 0.70,
    "largest_line": 0.65,
    "count_board": 0.35,
    "two_conditions": 0.35,
    "count_lines": 0.35,
    "sum_line": 0.30,
    "sum_diagonal": 0.30,
    "difference": 0.25,
}
"""How readily a person answers a question of this family without writing the working down:
the share of chains that glance or are brief. Which of two, where, whether: that is guessed readily."""


def strategy_shares(family: str) -> dict[str, float]:
    """Probability of each strategy for a question of the family."""
    terse = TERSENESS[family]
    return {
        "glance": 0.85 * terse,
        "brief": 0.15 * terse,
        "detailed": 0.85 * (1 - terse),
        "checked": 0.15 * (1 - terse),
    }


def pick_strategy(family: str, generator: np.random.Generator) -> str:
    """A strategy drawn by the family's shares."""
    shares = strategy_shares(family)
    return str(generator.choice(list(shares), p=list(shares.values())))


def chain(question: BoardQuestion, strategy: str) -> list[Step]:
    """The steps of one chain; the last one's action is `final_answer`."""
    plan = question.plan
    if strategy == "glance":
        parts = []
    elif strategy == "brief":
        parts = [("Read", _reads(question))]
    elif strategy in ("detailed", "checked"):
        parts = [("Mean", ", ".join(plan.opening))] if plan.opening else []
        parts += _read_and_worked(question) if any(plan.work) else [("Read", _reads(question))]
        if plan.close:
            parts.append(("Join", ", ".join(plan.close)))
        if strategy == "checked" and (plan.close or any(plan.work)):
            parts.append(("Check", _second_route(question)))
    else:
        raise ValueError(f"unknown strategy {strategy!r}; one of {', '.join(STRATEGIES)}")
    parts.append(("Guess" if strategy in ("glance", "brief") else "Answer", question.answer))
    last = len(parts) - 1
    return [
        Step(title, content, "final_answer" if i == last else "continue")
        for i, (title, content) in enumerate(parts)
    ]


def _read_and_worked(question: BoardQuestion) -> list[tuple[str, str]]:
    parts = []
    for (line, digits), work in zip(question.plan.reads, question.plan.work, strict=True):
        parts += [("Read", f"{line} is {_join(digits)}"), ("Work", ", ".join(work))]
    return parts


def _join(digits: list[int]) -> str:
    return " ".join(map(str, digits))


def _reads(question: BoardQuestion) -> str:
    return ", ".join(f"{line} is {_join(digits)}" for line, digits in question.plan.reads)


def _second_route(question: BoardQuestion) -> str:
    """The same lines read again from the end, sums taken in that order:
    a route that does not repeat the first. It ends where the working ended, next to the answer."""
    parts = []
    for (line, digits), work in zip(question.plan.reads, question.plan.work, strict=True):
        back = digits[::-1]
        parts.append(f"{line} backwards is {_join(back)}" if len(back) > 1 else f"{line} is {_join(back)}")
        if "+" in " ".join(work):
            parts.extend(running_sum(back))
    result = (question.plan.close or question.plan.work[-1])[-1]
    if result not in question.plan.work[-1] or "+" not in result:
        parts.append(result)
    return ", ".join(parts)
