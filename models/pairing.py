"""Preference pairs from scored paths (METHOD 1.4). Rules are pure functions by name; ties never make a pair.

    from models.pairing import RULES, build_pairs, first_difference

A rule takes the paths of one question and gives (chosen, rejected) pairs, or the reason why there is none.
`first_difference` narrows a pair to the step at which its paths part.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from models.records import ReasoningPath


@dataclass(frozen=True)
class Pair:
    """Two completions of one question; margin: the judge's score of chosen less that of rejected.

    prefix: what both sides begin with and neither is trained on; *_goes_on: the side is the beginning of
    a longer text, and its end is no end of turn.
    """

    question_id: str
    chosen: str
    rejected: str
    chosen_score: int
    rejected_score: int
    margin: int
    prefix: str = ""
    chosen_goes_on: bool = False
    rejected_goes_on: bool = False


UNSCORED = 101
"""Where a path without a score stands among the wrong ones: behind every scored one (1-100)."""

Outcome = list[tuple[ReasoningPath, ReasoningPath]] | str
Rule = Callable[[Sequence[ReasoningPath], int], Outcome]


def best_right_vs_worst_wrong(paths: Sequence[ReasoningPath], pairs: int) -> Outcome:
    """The best-scored right paths against the worst-scored wrong ones,
    rank by rank (MPO, arXiv 2411.10442, 3.1)."""
    right = sorted((p for p in paths if p.right is True), key=lambda p: (-(p.score or 0), p.sample))
    wrong = sorted((p for p in paths if p.right is False), key=lambda p: (p.score or UNSCORED, p.sample))
    if not right or not wrong:
        return "all_wrong" if not right else "all_right"
    return list(zip(right[:pairs], wrong[:pairs], strict=False))


def best_vs_worst_score(paths: Sequence[ReasoningPath], pairs: int) -> Outcome:
    """The highest reward against the lowest, ties dropped; a wrong answer counts as
    less than any right one (RLHFlow)."""

    def rank(path: ReasoningPath) -> tuple[bool, int]:
        return path.right is True, path.score or 0

    known = [p for p in paths if p.right is not None]
    if not any(p.right for p in known):
        return "all_wrong"
    ordered = sorted(known, key=lambda p: (rank(p), -p.sample), reverse=True)
    found = [(a, b) for a, b in zip(ordered, ordered[::-1], strict=True) if rank(a) > rank(b) and a.right]
    return found[:pairs] or "tie"


RULES: dict[str, Rule] = {
    "best_right_vs_worst_wrong": best_right_vs_worst_wrong,
    "best_vs_worst_score": best_vs_worst_score,
}


def build_pairs(
    groups: Iterable[Sequence[ReasoningPath]],
    rule: str,
    pairs_per_question: int = 1,
    min_margin: int = 1,
    most: int | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of every question and how many questions or pairs were dropped, by reason.

    A pair is dropped when the texts are equal, when a side has no text or no score,
    and when the judge prefers the rejected side or sees less than `min_margin` between them
    (the judge and the answer filter disagree: not a clear preference), or when the right answer stands in the
    rejected one (`contains`). Of what is left the first `most` are kept.
    """
    if rule not in RULES:
        raise ValueError(f"unknown pair rule {rule!r}; one of {', '.join(RULES)}")
    kept: list[Pair] = []
    dropped: Counter[str] = Counter()
    for paths in groups:
        outcome = RULES[rule](distinct(paths), pairs_per_question)
        if isinstance(outcome, str):
            dropped[outcome] += 1
            continue
        for chosen, rejected in outcome:
            if reason := _unfit(chosen, rejected, min_margin):
                dropped[reason] += 1
                continue
            a, b = chosen.score or 0, rejected.score or 0
            kept.append(Pair(chosen.question_id, chosen.text, rejected.text, a, b, a - b))
    if most is not None and len(kept) > most:
        dropped["above_max_pairs"] = len(kept) - most
    return kept[:most], dict(sorted(dropped.items()))


def first_difference(pair: Pair) -> Pair:
    """The pair cut down to the first step (a line) in which its sides differ; the steps before become the
    prefix (Step-DPO, arXiv 2406.18629, 3.1). What follows a first difference follows from it, and is noise to
    the preference."""
    chosen, rejected = pair.chosen.splitlines(keepends=True), pair.rejected.splitlines(keepends=True)
    shared, last = 0, min(len(chosen), len(rejected)) - 1
    while shared < last and chosen[shared] == rejected[shared]:
        shared += 1
    (left, left_goes_on), (right, right_goes_on) = (
        _first_step(chosen[shared:]),
        _first_step(rejected[shared:]),
    )
    return replace(
        pair,
        prefix="".join(chosen[:shared]),
        chosen=left,
        rejected=right,
        chosen_goes_on=left_goes_on,
        rejected_goes_on=right_goes_on,
    )


def _first_step(lines: list[str]) -> tuple[str, bool]:
    """The first of the lines and that more follow; the last step with the frame that closes it."""
    goes_on = len(lines) > 2
    return "".join(lines[:1] if goes_on else lines), goes_on


def distinct(paths: Sequence[ReasoningPath]) -> list[ReasoningPath]:
    """The first path of every text."""
    seen: dict[str, ReasoningPath] = {}
    for path in paths:
        seen.setdefault(path.text, path)
    return list(seen.values())


def _unfit(chosen: ReasoningPath, rejected: ReasoningPath, min_margin: int) -> str | None:
    if not chosen.text or not rejected.text:
        return "empty"
    if chosen.text == rejected.text:
        return "equal"
    if chosen.score is None or rejected.score is None:
        return "unscored"
    if chosen.score - rejected.score < min_margin:
        return "judge_disagrees"
    if chosen.right and not rejected.right and contains(rejected.answer, chosen.answer):
        return "answer_contained"
    return None


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as words or a number of its own: the text may then mean it, and
    the answer filter have missed that (MPO, arXiv 2411.10442, leaves out such pairs)."""
    said, wanted = (" ".join(part.lower().split()) for part in (text, answer))
    return bool(wanted) and re.search(rf"(?<![\w.\-]){re.escape(wanted)}(?!\w|\.\w)", said) is not None
