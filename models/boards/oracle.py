"""The oracle: what the annotation says of every step of a path on a board. It measures judges;
it trains none but the embedded one, and no stage that a user's own data passes through needs it.

    python -c "from models.boards.oracle import claims; print(claims('top row is 3 5 8, 3 + 5 = 9'))"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.boards.questions import CELLS, DIAGONALS, LINES, condition_in, line_digits
from models.records import Step

_READ = re.compile(rf"({'|'.join(LINES + DIAGONALS + CELLS)})( backwards)? is ((?:\d ?)+)$")
_ARITHMETIC = re.compile(r"(\d{1,9}) ([+-]) (\d{1,9}) = (\d{1,9})$")
_COMPARISON = re.compile(r"(?:[a-z ]+ )?(\d{1,9}) to (?:[a-z ]+ )?(\d{1,9}) (rises|falls|stays)$")
_MEANING = re.compile(r"([a-z\d ]+) means ((?:\d ?)+)$")
_TALLY = re.compile(r"((?:\d (?:yes|no) )+)makes (\d{1,9})$")
_PARITY = re.compile(r"(\d{1,9}) is (even|odd)$")


@dataclass(frozen=True)
class Verdict:
    """Of one path: checkable claims, how many are false, and the oracle's score 1-100. steps: of every step
    whether all its checkable claims are true; None where it makes none."""

    claims: int
    wrong: int
    score: int
    steps: tuple[bool | None, ...] = ()

    @property
    def step_accuracy(self) -> float:
        """Share of claims that are true (1.0 for a path that claims nothing that can be checked)."""
        return 1.0 - self.wrong / self.claims if self.claims else 1.0


def claims(content: str) -> list[str]:
    """The statements of a step, split at commas."""
    return [part.strip() for part in content.split(",") if part.strip()]


def check_claim(claim: str, digits: np.ndarray, holds: Callable[[int], bool] | None = None) -> bool | None:
    """Whether a statement is true of the board; None where it says nothing that can be checked.

    holds: the question's condition, by which the verdicts of a tally are checked.
    """
    if match := _READ.match(claim):
        line, backwards, said = match.groups()
        truth = [str(d) for d in line_digits(digits, line)]
        return said.split() == (truth[::-1] if backwards else truth)
    if match := _ARITHMETIC.match(claim):
        a, sign, b, c = match.groups()
        return int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    if match := _COMPARISON.match(claim):
        a, b, verdict = match.groups()
        return verdict == ("rises" if int(a) < int(b) else "falls" if int(a) > int(b) else "stays")
    if match := _MEANING.match(claim):
        meant = condition_in(match.group(1))
        return meant is not None and match.group(2).split() == [str(d) for d in range(10) if meant(d)]
    if match := _TALLY.match(claim):
        words = match.group(1).split()
        verdicts = [word == "yes" for word in words[1::2]]
        right = holds is None or verdicts == [holds(int(digit)) for digit in words[::2]]
        return right and sum(verdicts) == int(match.group(2))
    if match := _PARITY.match(claim):
        return ("odd" if int(match.group(1)) % 2 else "even") == match.group(2)
    return None


def assess_path(steps: Sequence[Step], answer_right: bool, digits: np.ndarray, question: str) -> Verdict:
    """Score a path as Insight-V's judge is asked to (section 3.2): step accuracy and detail, 1-100.

    Detail sets the ceiling (an answer without working 20, reads 55, worked out 85, checked 95);
    every false claim costs 30, a wrong answer 40.
    """
    holds = condition_in(question)
    by_step = [[check_claim(claim, digits, holds) for claim in claims(step.content)] for step in steps]
    checked = [result for results in by_step for result in results if result is not None]
    wrong = checked.count(False)
    titles = {step.title for step in steps}
    ceiling = 95 if "Check" in titles else 85 if titles & {"Work", "Join"} else 55 if "Read" in titles else 20
    score = ceiling - 30 * wrong - (0 if answer_right else 40)
    verdicts = [[result for result in results if result is not None] for results in by_step]
    return Verdict(
        len(checked), wrong, max(1, min(100, score)), tuple(all(own) if own else None for own in verdicts)
    )
