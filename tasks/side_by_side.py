"""Generations side by side: the lines of `longview compare`, what they say, and their form in a pull request.

    longview compare --markdown -

Differences are paired: only where two generations answered the same questions, for an id alone may name
another question after the data has changed.
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
            }
            for row in self.rows
        ]
        return {"verdict": self.verdict, "champion": self.champion, "rows": rows}


def answers(path: Path | None) -> list[Mapping[str, Any]]:
    """The rows of a predictions.jsonl; none if there is no file."""
    return list(read_jsonl(path)) if path and path.is_file() else []


def lines(found: Sequence[Generation], champion: results.Rows) -> list[Row]:
    """Each generation with its paired differences."""
    return [
        Row(
            generation,
            previous=paired(generation.rows, before.rows) if before else None,
            champion=paired(generation.rows, champion) if champion else None,
        )
        for before, generation in zip([None, *found], found, strict=False)
    ]


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
    """One sentence: the last generation against the first, and against the champion."""
    first, last = rows[0].generation, rows[-1].generation
    share = results.percent(last.system["accuracy"][SET])
    gain = paired(last.rows, first.rows) if len(rows) > 1 else None
    parts = [f"{last.title}: {share}% on {last.system['accuracy'][SET]['n']:,} reasoning questions"]
    if gain:
        sure = "" if gain["low"] > 0 or gain["high"] < 0 else ", within chance"
        parts.append(f"{results.points(gain)} points against {first.title}{sure}")
    elif len(rows) > 1:
        parts.append(f"not paired with {first.title}: other questions, or answers that are gone")
    return "; ".join(parts) + "."


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
    "agreement",
    "tokens",
    "data",
    "from",
)


def cells(row: Row) -> list[str]:
    """The texts of a line, in the order of HEAD."""
    g, facts = row.generation, row.generation.round
    pairs, reward = facts.get("pairs") or {}, facts.get("reward") or {}
    agreement = (facts.get("agreement") or {}).get("rank_correlation")
    tokens = g.system.get("reasoning_tokens")
    return [
        g.title,
        *(results.percent(g.system["accuracy"][name]) for name in results.SETS),
        *(significance(found) for found in (row.previous, row.champion)),
        *(_number(reward.get(name)) for name in ("mean", "margin_mean")),
        str(pairs.get("kept", "")),
        ", ".join(f"{reason} {count}" for reason, count in (pairs.get("dropped") or {}).items()),
        "" if agreement is None else f"{agreement:.2f}",
        "" if tokens is None else f"{tokens:.0f}",
        (g.data or "")[:8],
        g.policy or "",
    ]


def significance(found: Mapping[str, Any] | None) -> str:
    """+2.4 (+1.2 to +3.6), p 0.0002"""
    return "" if found is None else f"{results.points(found)}, p {found['p']:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def markdown(found: Comparison) -> str:
    """For a pull request: the verdict, the table without empty columns, and how to read it."""
    lines = [cells(row) for row in found.rows]
    used = [at for at in range(len(HEAD)) if any(line[at] for line in lines)]
    table = [[HEAD[at] for at in used], ["---"] * len(used), *([line[at] for at in used] for line in lines)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    note = (
        "95% intervals (Wilson); differences in points on test reasoning, paired bootstrap, empty where the "
        "questions were others."
    )
    return f"**{found.verdict}**\n\n{text}\n\n{note}" + (
        f" Champion: {found.champion}." if found.champion else ""
    )
