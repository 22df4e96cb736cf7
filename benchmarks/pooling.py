"""Predictions of several seeds pooled: accuracy, paired differences, and the claims of the ablation.

    from benchmarks.pooling import claims, difference

Every seed answers the same questions. A question's answers are averaged over the seeds first, and then the
questions are drawn (bootstrap), so that a question asked three times does not count as three. The interval
says which questions might have been asked, not which seeds might have been used: each seed stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from benchmarks.results import Row, Table
from models.results import ResultsError, Rows, percent, points, select
from models.statistics import Difference, Proportion, paired_bootstrap, wilson

Predictions = Mapping[int, Mapping[str, Rows]]
"""seed -> system -> predictions"""
SETS = ("reasoning", "perception")
RESAMPLES = 10_000
TITLES = {
    "base": "Base, answers directly",
    "summary_only": "Summary agent only",
    "direct_sft": "Direct SFT",
    "multi_turn": "Multi-turn",
    "multi_agent": "Multi-agent",
}


@dataclass(frozen=True)
class Claim:
    """`better` − `worse` on a set: its mean, or the low end of its 95% interval, against `bound` (points)."""

    better: str
    worse: str
    set: str = "reasoning"
    figure: Literal["mean", "low"] = "mean"
    bound: float = 0.0
    strict: bool = True

    @property
    def target(self) -> str:
        """What is promised, in words."""
        where = "low end " if self.figure == "low" else ""
        return f"{where}{'>' if self.strict else '≥'} {self.bound:+g}".replace("+0", "0").replace("-", "−")

    def holds(self, found: Difference) -> bool:
        """Whether a difference keeps the promise."""
        value = getattr(found, self.figure)
        if value is None:
            return False
        value = round(100 * value, 6)
        return value > self.bound if self.strict else value >= self.bound


def claims(rounds: Sequence[str]) -> list[Claim]:
    """What the project promises (the order of Insight-V's ablation), for the rounds there are."""
    last = rounds[-1] if rounds else "multi_agent"
    order = ("base", "summary_only", "direct_sft", "multi_turn", "multi_agent")
    made = [Claim(last, "base", bound=7, strict=False)]
    made += [Claim(better, worse) for worse, better in pairwise(order)]
    if rounds:
        made.append(Claim(rounds[0], "multi_agent", figure="low"))
    if len(rounds) > 1:
        made.append(Claim(last, rounds[0], figure="low"))
    return [*made, Claim(last, "base", "perception", bound=-1, strict=False)]


def systems(rounds: Sequence[str]) -> list[str]:
    """Every system, in the order of the table."""
    agents = ["multi_agent", *rounds]
    return [
        "base",
        "summary_only",
        "direct_sft",
        "multi_turn",
        *(f"reasoner_only@{name}" for name in agents),
        *agents,
    ]


def title(system: str) -> str:
    """A system in words."""
    name, _, of = system.partition("@")
    if name == "reasoner_only":
        return "Reasoning agent only" + ("" if of == "multi_agent" else f", round {of[1:]}")
    return TITLES.get(system) or f"Multi-agent, round {system[1:]}"


def shares(predictions: Predictions, system: str, name: str) -> dict[str, float]:
    """Question id -> share of the seeds that answered it right; ResultsError if their questions differ."""
    by_seed = [
        {row["id"]: float(row["right"]) for row in select(of[system], name)} for of in predictions.values()
    ]
    if any(set(other) != set(by_seed[0]) for other in by_seed):
        raise ResultsError(
            f"{system}: the seeds did not answer the same {name} questions; their data/ differs. "
            "Bring every folder to one version of the data and run the benchmark again."
        )
    return {key: sum(of[key] for of in by_seed) / len(by_seed) for key in by_seed[0]}


def accuracy(predictions: Predictions, system: str, name: str) -> Proportion:
    """Share of right answers over all seeds with its 95% interval; n counts questions."""
    values = list(shares(predictions, system, name).values())
    if len(predictions) == 1:
        return wilson(round(sum(values)), len(values))
    found = paired_bootstrap(values, [0.0] * len(values), resamples=RESAMPLES)
    return Proportion(found.mean, found.low, found.high, found.n)


def difference(predictions: Predictions, better: str, worse: str, name: str) -> Difference:
    """Accuracy of `better` − that of `worse` over all seeds, paired by question, with its 95% interval."""
    a, b = shares(predictions, better, name), shares(predictions, worse, name)
    if set(a) != set(b):
        raise ResultsError(
            f"{better} and {worse} did not answer the same {name} questions: evaluate both again."
        )
    return paired_bootstrap([a[key] for key in b], list(b.values()), resamples=RESAMPLES)


def each_seed(predictions: Predictions) -> list[tuple[str, Predictions]]:
    """All seeds together, then each by itself, with its name."""
    single: list[tuple[str, Predictions]] = [(f"seed {seed}", {seed: of}) for seed, of in predictions.items()]
    return single if len(single) == 1 else [(f"{len(single)} seeds", predictions), *single]


def accuracy_rows(predictions: Predictions, rounds: Sequence[str]) -> list[Row]:
    """Accuracy of every system on both sets, pooled and by seed."""
    rows = []
    for name in SETS:
        for system in systems(rounds):
            for label, part in each_seed(predictions):
                found = accuracy(part, system, name)
                if found.n:
                    what = f"accuracy of {system} on {name}, {label} ({_interval(found)})"
                    rows.append(Row(what, _hundred(found.mean), "%"))
    return rows


def claim_rows(predictions: Predictions, rounds: Sequence[str]) -> list[Row]:
    """Every claim on all seeds with its target, and the same figure by seed without one."""
    rows = []
    for claim in claims(rounds):
        for index, (label, part) in enumerate(each_seed(predictions)):
            found = difference(part, claim.better, claim.worse, claim.set)
            what = f"{claim.better} − {claim.worse} on {claim.set}, {label} ({_interval(found)})"
            if claim.figure == "low":
                what = f"low end of {what}"
            judged = (claim.target, claim.holds(found)) if index == 0 else (None, None)
            rows.append(Row(what, _hundred(getattr(found, claim.figure)), "points", *judged))
    return rows


def _interval(found: Proportion | Difference) -> str:
    if found.mean is None or found.low is None or found.high is None:
        return "no questions"
    paired = isinstance(found, Difference)
    mean = f"mean {100 * found.mean:+.2f}, paired " if paired else ""
    sign = "+" if paired else ""
    return (
        f"{mean}95% interval {100 * found.low:{sign}.2f} to {100 * found.high:{sign}.2f}, "
        f"{found.n:,} questions"
    )


def _hundred(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def accuracy_table(predictions: Predictions, rounds: Sequence[str], name: str) -> Table:
    """Systems against seeds."""
    parts = each_seed(predictions)
    cells = [
        [title(system), *(percent(asdict(accuracy(part, system, name))) for _, part in parts)]
        for system in systems(rounds)
    ]
    n = accuracy(predictions, "base", name).n
    caption = f"Accuracy in % with 95% intervals on {n:,} {name} test questions, greedy decoding."
    if len(predictions) > 1:
        caption += " Over all seeds: a question's mean over the seeds, bootstrap over questions."
    return Table(f"{name.capitalize()}", ("System", *(label for label, _ in parts)), cells, caption)


def claim_table(predictions: Predictions, rounds: Sequence[str]) -> Table:
    """Every claim with its difference over all seeds and by seed."""
    parts, cells = each_seed(predictions), []
    for claim in claims(rounds):
        found: list[Any] = [difference(part, claim.better, claim.worse, claim.set) for _, part in parts]
        name = f"{claim.better} − {claim.worse}"
        shown = [points(asdict(one)) for one in found]
        cells.append([name, claim.set, *shown, claim.target, "yes" if claim.holds(found[0]) else "NO"])
    caption = "Differences in points with 95% intervals of the paired bootstrap over questions."
    head = ("Difference", "Set", *(label for label, _ in parts), "Target", "Holds")
    return Table("Claims", head, cells, caption)
