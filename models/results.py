"""What evaluated answers add up to: accuracy, paired differences, the 2x2 of reasoning and answer.

    python -c "from models.results import accuracy; print(accuracy([{'right': True}, {'right': False}]))"

A prediction is a row of predictions.jsonl: id, set, split, family, right, reasoning_right, reasoning_tokens,
failure. A failure is counted; whether the answer is right is the answer's own matter: a summary agent whose
reasoner wrote nothing readable answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from models.statistics import paired_bootstrap, wilson

Rows = Sequence[Mapping[str, Any]]
SETS = {"reasoning": ("test", "reasoning"), "perception": ("test", "perception")}
SETS["validation"] = ("validation", "reasoning")


class ResultsError(ValueError):
    """Predictions that cannot be compared; the message says what to do."""


def select(rows: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The predictions of one set: reasoning and perception are test questions, validation is for choosing."""
    split, kind = SETS[name]
    return [row for row in rows if row["split"] == split and row["set"] == kind]


def accuracy(rows: Rows) -> dict[str, Any]:
    """Share of right answers with Wilson's 95% interval; in `failures` of them a chain or an answer could not
    be read, or was cut off."""
    share = asdict(wilson(sum(bool(row["right"]) for row in rows), len(rows)))
    return {**share, "failures": sum(row.get("failure") is not None for row in rows)}


def difference(rows: Rows, others: Rows, *, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Accuracy of `rows` minus that of `others` on the same questions, with a paired 95% interval and p."""
    by_id = {row["id"]: row for row in others}
    if {row["id"] for row in rows} != set(by_id) or len(by_id) != len(others) or len(rows) != len(others):
        raise ResultsError(
            f"two systems did not answer the same questions ({len(rows)} and {len(others)}): "
            "one was evaluated on other data. Evaluate both again: `dvc repro`."
        )
    right = [float(row["right"]) for row in rows]
    other = [float(by_id[row["id"]]["right"]) for row in rows]
    return asdict(paired_bootstrap(right, other, resamples=resamples, seed=seed))


def two_by_two(rows: Rows) -> dict[str, int] | None:
    """How often reasoning and final answer were right or wrong; None for a system that does not reason."""
    known = [row for row in rows if row.get("reasoning_right") is not None]
    if not known:
        return None
    counts = {f"reasoning_{a}_answer_{b}": 0 for a in ("right", "wrong") for b in ("right", "wrong")}
    for row in known:
        reasoning, answer = ("right" if row[key] else "wrong" for key in ("reasoning_right", "right"))
        counts[f"reasoning_{reasoning}_answer_{answer}"] += 1
    return counts


def mean_length(rows: Rows) -> float | None:
    """Mean reasoning length in tokens over the answers that reasoned."""
    lengths = [row["reasoning_tokens"] for row in rows if row.get("reasoning")]
    return sum(lengths) / len(lengths) if lengths else None


def by_family(rows: Rows) -> dict[str, dict[str, Any]]:
    """Accuracy of each question family, by name."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault(row.get("family") or "unnamed", []).append(row)
    return {name: accuracy(families[name]) for name in sorted(families)}


def percent(share: Mapping[str, Any]) -> str:
    """61.2 (58.7–63.6)"""
    if share["mean"] is None:
        return "–"
    return f"{100 * share['mean']:.1f} ({100 * share['low']:.1f}–{100 * share['high']:.1f})"


def points(difference: Mapping[str, Any] | None) -> str:
    """+4.5 (+2.1 to +6.9)"""
    if not difference or difference["mean"] is None:
        return "–"
    return (
        f"{100 * difference['mean']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
    )


HEAD = (
    "System",
    "Reasoning",
    "Against base",
    "Against previous",
    "Perception",
    "Validation",
    "Tokens",
    "Failed",
)


def table_rows(
    comparison: Mapping[str, Any], title: Callable[[str], str] = str, best: str | None = None
) -> dict[str, Any]:
    """The result table as text cells, one row a system, in percent and points; `best` marks a row."""
    rows = []
    for name in comparison["order"]:
        system = comparison["systems"][name]
        shares, against, tokens = system["accuracy"], system["against"], system["reasoning_tokens"]
        cells = [
            title(name),
            percent(shares["reasoning"]),
            *(points(against.get(label, {}).get("reasoning")) for label in ("base", "previous")),
            percent(shares["perception"]),
            percent(shares["validation"]),
            "–" if tokens is None else f"{tokens:.0f}",
            str(sum(share["failures"] for share in shares.values())),
        ]
        rows.append({"cells": cells, "best": name == best})
    n = {key: share["n"] for key, share in comparison["systems"][comparison["order"][0]]["accuracy"].items()}
    caption = (
        f"Accuracy in % with 95% intervals (Wilson) on {n['reasoning']:,} reasoning and {n['perception']:,} "
        f"perception test questions, and {n['validation']:,} validation questions. Differences in points on "
        "reasoning, with 95% intervals of the paired bootstrap. Tokens: mean length of the reasoning. "
        "Failed: chains that could not be read or were cut off (the summary agent then answers alone), and "
        "answers that were cut off."
    )
    return {"head": list(HEAD), "rows": rows, "caption": caption}


def table(comparison: Mapping[str, Any]) -> str:
    """The result table in Markdown."""
    found = table_rows(comparison)
    rule = ["---", *["---:"] * (len(HEAD) - 1)]
    lines = [found["head"], rule, *(row["cells"] for row in found["rows"])]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", found["caption"], ""])
