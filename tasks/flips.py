"""The questions that flipped between two generations: wrong before and right now, and the other way round.

    python -c "from tasks.flips import flips; print(flips([], []))"

A gain of two points may be thirty questions won and fifteen lost: the page shows which, with the chains.
Where records are annotated (the embedded boards), the oracle scores each chain and marks its false steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import results
from models.images import read_image
from models.records import read_jsonl
from models.results import Rows
from tasks import side_by_side
from tasks.pages import Pictures, render, thumbnail
from tasks.side_by_side import Comparison

SHOWN = 200
"""Of each direction; the page says how many there are."""


@dataclass(frozen=True)
class Flips:
    """Pairs of predictions (before, after) of the same question, in the order of the later file."""

    won: list[tuple[Any, Any]]
    lost: list[tuple[Any, Any]]


@dataclass(frozen=True)
class Source:
    """Where questions come from. boards: what the image shows, as digits, by question id, where known."""

    pictures: Pictures
    boards: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)


def flips(before: Rows, after: Rows) -> Flips:
    """Test questions whose answer turned right or wrong. Questions that only one of them has are left out."""
    known = {_key(row): row for row in before if row["split"] == "test"}
    pairs = [(known[_key(row)], row) for row in after if row["split"] == "test" and _key(row) in known]
    return Flips(
        won=[(old, new) for old, new in pairs if new["right"] and not old["right"]],
        lost=[(old, new) for old, new in pairs if old["right"] and not new["right"]],
    )


def _key(row: Any) -> tuple[Any, ...]:
    """An id alone may name another question after the data has changed."""
    return row["id"], row["question"], row["truth"]


def source_of(folder: Path) -> Source:
    """The images and annotations below data/; no name of an image leads out of it."""
    records = folder / "records.jsonl"
    boards = boards_of(records) if records.is_file() else {}
    return Source(lambda name: read_image(folder, name), boards)


def boards_of(records: Path) -> dict[str, Sequence[Sequence[int]]]:
    """The digits that images show, by record, of a records.jsonl; only annotated records have them."""
    shown = ((record["id"], (record.get("annotation") or {}).get("digits")) for record in read_jsonl(records))
    return {key: digits for key, digits in shown if digits}


def page(found: Flips, before: str, after: str, source: Source, comparison: Comparison | None = None) -> str:
    """One self-contained HTML page, with the comparison above the questions if there is one. Everything that
    a model or a person wrote is escaped."""
    sections = [
        {
            "title": title,
            "count": len(rows),
            "families": _families(rows),
            "rows": [_shown(*pair, source) for pair in rows[:SHOWN]],
        }
        for title, rows in (("wrong → right", found.won), ("right → wrong", found.lost))
    ]
    return render(
        "flips.html.j2",
        before=before,
        after=after,
        sections=sections,
        shown=SHOWN,
        scored=bool(source.boards),
        overview=_overview(comparison) if comparison else None,
    )


def _overview(found: Comparison) -> dict[str, Any]:
    sets = []
    for name in results.SETS:
        rows = [(row, row.generation.system["accuracy"][name]) for row in found.rows]
        bars = [_bar(row, share) for row, share in rows if share["mean"] is not None]
        if bars:
            sets.append({"title": name.capitalize(), "bars": bars})
    return {
        "verdict": found.verdict,
        "sets": sets,
        "table": side_by_side.table(found),
        "note": side_by_side.NOTE,
        "champion": found.champion,
    }


def _bar(row: side_by_side.Row, share: Mapping[str, Any]) -> dict[str, Any]:
    ends = {end: round(100 * share[end], 2) for end in ("mean", "low", "high")}
    kind = "bar" if row.generation.candidate or row.is_champion else "other"
    return {"name": row.generation.title, "text": results.percent(share), "kind": kind, **ends}


def _families(rows: Sequence[tuple[Any, Any]]) -> str:
    """`sum row 12, order 5`: what kinds of question they are, most frequent first."""
    counts = Counter(new.get("family") for _, new in rows if new.get("family"))
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.most_common(8))


def _shown(old: Any, new: Any, source: Source) -> dict[str, Any]:
    names: Sequence[str] = new.get("images") or [new.get("image")]
    digits = source.boards.get(new["id"])
    return {
        "id": new["id"],
        "family": (new.get("family") or "").replace("_", " "),
        "question": new["question"],
        "truth": new["truth"],
        "pictures": [thumbnail(name, source.pictures) for name in names if name],
        "sides": [_side(row, digits) for row in (old, new)],
    }


def _side(row: Any, digits: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """An answer with its chain: steps, whether each holds, and the oracle's score, where they can be had."""
    from models.reasoning import StepError, parse_thoughts

    text, steps, facts = row.get("reasoning"), [], []
    with suppress(StepError):  # it is shown as it is
        steps = parse_thoughts(text) if text else []
    holds: Sequence[bool | None] = [None] * len(steps)
    if row.get("reasoning_right") is not None:
        facts.append(f"reasoned {'right' if row['reasoning_right'] else 'wrong'}")
    if steps and digits:
        import numpy as np

        from models.boards.oracle import assess_path

        verdict = assess_path(steps, bool(row.get("reasoning_right")), np.array(digits), row["question"])
        holds = verdict.steps
        facts.append(f"score {verdict.score}")
    if row.get("reasoning_tokens"):
        facts.append(f"{row['reasoning_tokens']} tokens")
    if row.get("failure"):
        facts.append(str(row["failure"]))
    return {
        "right": row["right"],
        "answer": row["answer"],
        "facts": ", ".join(facts),
        "text": text,
        "steps": [
            {"title": step.title, "content": step.content, "holds": own}
            for step, own in zip(steps, holds, strict=True)
        ],
    }
