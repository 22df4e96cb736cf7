"""Generations side by side: the lines of `longview compare`, what they say, and their form in a pull request.

    longview compare --markdown -

Differences are paired: only where two generations answered the same questions, for an id alone may name
another question after the data has changed. The p of a column are Holm's: a table of many generations has a
small one by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models import results
from models.records import read_jsonl

WORKSPACE = "this checkout"
SET = "reasoning"
RESAMPLES = 10_000


@dataclass(frozen=True)
class Generation:
    """One generation of one run. `system` and `round` are its parts of comparison.json."""

    run: str
    name: str
    data: str | None
    system: Mapping[str, Any]
    round: Mapping[str, Any]
    policy: str | None
    """What it was trained from: the generation before it."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """DVC's md5 of each checkpoint that answered, by path; the reasoning agent's first."""
    policy_md5: str | None = None
    candidate: bool = False
    """Whether its run's gate decided on it."""
    rows: Sequence[Mapping[str, Any]] = field(repr=False, default=())
    """Its answers; empty if they are not to be had."""

    @property
    def title(self) -> str:
        """`r2`, or `r2 of run/20261123-1a2b3c4d`."""
        return self.name if self.run == WORKSPACE else f"{self.name} of {self.run}"


@dataclass(frozen=True)
class Row:
    """One line of the comparison. Differences are on test reasoning, paired; None where the questions are
    others or the answers are gone."""

    generation: Generation
    previous: Mapping[str, Any] | None
    champion: Mapping[str, Any] | None
    is_champion: bool = False


@dataclass(frozen=True)
class Champion:
    """Who is champion: its title, its answers (none if they are gone), and md5s of its two checkpoints."""

    title: str
    rows: results.Rows = field(repr=False)
    checkpoints: frozenset[str]


@dataclass(frozen=True)
class Comparison:
    """What is printed. `champion`: its title, None without one. `verdict`: one sentence."""

    rows: list[Row]
    champion: str | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without answers."""
        rows = [
            {
                **{k: v for k, v in asdict(row.generation).items() if k != "rows"},
                "previous": row.previous,
                "champion": row.champion,
                "is_champion": row.is_champion,
            }
            for row in self.rows
        ]
        return {"verdict": self.verdict, "champion": self.champion, "rows": rows}


def answers(path: Path | None) -> list[Mapping[str, Any]]:
    """The rows of a predictions.jsonl; none if there is no file."""
    return list(read_jsonl(path)) if path and path.is_file() else []


def lines(found: Sequence[Generation], champion: Champion | None = None) -> list[Row]:
    """Each generation with its paired differences: against the one before it in its run, and the champion.

    Where every run shows one generation, the one before is that of the run before.
    """
    several = len({generation.run for generation in found}) < len(found)
    previous, against = [], []
    for before, generation in zip([None, *found], found, strict=False):
        beside = before if before and (before.run == generation.run or not several) else None
        previous.append(paired(generation.rows, beside.rows) if beside else None)
        other = champion if not _is(generation, champion) else None
        against.append(paired(generation.rows, other.rows) if other else None)
    tested = zip(found, adjusted(previous), adjusted(against), strict=True)
    return [Row(generation, before, other, _is(generation, champion)) for generation, before, other in tested]


def _is(generation: Generation, champion: Champion | None) -> bool:
    md5s = set(generation.checkpoints.values())
    return champion is not None and bool(md5s) and md5s == champion.checkpoints


def adjusted(found: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any] | None]:
    """The differences with `p_holm` (Holm 1979): p as one of that many tests."""
    tests = sorted((test["p"], at) for at, test in enumerate(found) if test and test["p"] is not None)
    largest, ps = 0.0, {}
    for rank, (p, at) in enumerate(tests):
        largest = max(largest, min(1.0, p * (len(tests) - rank)))
        ps[at] = largest
    return [None if test is None else {**test, "p_holm": ps.get(at)} for at, test in enumerate(found)]


def paired(rows: results.Rows, others: results.Rows) -> dict[str, Any] | None:
    """The paired difference on test reasoning; None unless both answered the same questions."""
    mine, theirs = (results.select(some, SET) for some in (rows, others))
    if not mine or {_question(row) for row in mine} != {_question(row) for row in theirs}:
        return None
    with suppress(results.ResultsError):
        return results.difference(mine, theirs, resamples=RESAMPLES)
    return None


def _question(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["id"], row["question"], row["truth"]


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: the last candidate against the first generation of all, and against the champion."""
    first = rows[0].generation
    chosen = [row for row in rows if row.generation.candidate] or rows
    row, last = chosen[-1], chosen[-1].generation
    share = last.system["accuracy"][SET]
    parts = [f"{last.title}: {results.percent(share)}% on {share['n']:,} reasoning questions"]
    if last is not first:
        parts.append(_against(first.title, paired(last.rows, first.rows)))
    if row.is_champion:
        parts.append("it is the champion")
    elif row.champion:
        parts.append(_against("the champion", row.champion))
    return "; ".join(parts) + "."


def _against(title: str, gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return f"not paired with {title}: other questions, or answers that are gone"
    sure = "" if gain["low"] > 0 or gain["high"] < 0 else ", within chance"
    return f"{results.points(gain)} points against {title}{sure}"


def flipped(rows: Sequence[Row]) -> tuple[Generation, Generation] | None:
    """Between which two generations flipped questions are shown, if nobody says: the first of the last
    candidate's run that reasons, or the run before if each shows one, and the candidate. None: there are no
    two with answers."""
    every = [row.generation for row in rows]
    after = next((g for g in reversed(every) if g.candidate), every[-1])
    earlier = [g for g in every[: every.index(after)] if g.rows]
    same = [g for g in earlier if g.run == after.run]
    if not after.rows or not earlier:
        return None
    return next((g for g in same if g.system.get("reasoning_tokens")), (same or earlier)[-1]), after


HEAD = (
    "generation",
    "reasoning, %",
    "perception, %",
    "validation, %",
    "against the one before",
    "against the champion",
    "reward",
    "margin",
    "pairs",
    "dropped",
    "judge's agreement",
    "length, tokens",
    "chosen, rejected: words",
    "data",
    "checkpoint",
    "from",
)


def cells(row: Row) -> list[str]:
    """The texts of a line, in the order of HEAD."""
    g, facts = row.generation, row.generation.round
    pairs, reward = facts.get("pairs") or {}, facts.get("reward") or {}
    words = facts.get("length") or {}
    tokens = g.system.get("reasoning_tokens")
    return [
        f"{g.title} (candidate)" if g.candidate else g.title,
        *(results.percent(g.system["accuracy"][name]) for name in results.SETS),
        significance(row.previous),
        "is champion" if row.is_champion else significance(row.champion),
        *(_number(reward.get(name)) for name in ("mean", "margin_mean")),
        str(pairs.get("kept", "")),
        ", ".join(f"{reason} {count}" for reason, count in (pairs.get("dropped") or {}).items()),
        agreement(facts.get("agreement") or {}),
        "" if tokens is None else f"{tokens:.0f}",
        ", ".join(filter(None, (_number(words.get(f"{kind}_mean")) for kind in ("chosen", "rejected")))),
        (g.data or "")[:8],
        next(iter(g.checkpoints.values()), "")[:8],
        f"{g.policy or ''} {(g.policy_md5 or '')[:8]}".strip(),
    ]


def significance(found: Mapping[str, Any] | None) -> str:
    """+2.4 (+1.2 to +3.6), p 0.0002"""
    return "" if found is None else f"{results.points(found)}, p {found['p_holm']:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def agreement(found: Mapping[str, Any]) -> str:
    """Of judge and truth: `AUC 0.81, rank 0.86`; what could not be measured is left out."""
    named = (("AUC", found.get("auc")), ("rank", found.get("rank_correlation")))
    return ", ".join(f"{name} {value:.2f}" for name, value in named if value is not None)


NOTE = (
    "95% intervals (Wilson); differences in points on test reasoning, paired bootstrap, p of a row by Holm; "
    "empty where the questions were others or the answers are gone. Agreement of the judge: AUC of right "
    "over wrong paths, rank correlation with the oracle."
)


def table(found: Comparison) -> list[list[str]]:
    """A row a figure, a column a generation, since there are more figures; without empty rows. The first row
    is the head."""
    columns = [cells(row) for row in found.rows]
    rows = [[name, *(column[at] for column in columns)] for at, name in enumerate(HEAD)]
    return [["", *rows[0][1:]], *(row for row in rows[1:] if any(row[1:]))]


def markdown(found: Comparison) -> str:
    """For a pull request: the verdict, the table, and how to read it."""
    head, *rows = table(found)
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    champion = f" Champion: {found.champion}." if found.champion else ""
    return f"**{found.verdict}**\n\n{text}\n\n{NOTE}{champion}"
