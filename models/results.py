"""What evaluated answers add up to: accuracy, paired differences, the 2x2 of reasoning and answer.

    python -c "from models.results import accuracy; print(accuracy([{'right': True}, {'right': False}]))"

A prediction is a row of predictions.jsonl: id, set, split, family, right, reasoning_right, reasoning_tokens,
failure. An answer that failed counts as wrong, and is counted as failed besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Share of right answers with Wilson's 95% interval; `failures` of them gave no answer at all."""
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
