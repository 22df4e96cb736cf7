"""Two versions of the data on one HTML page: counts, distributions side by side, examples with their images.

longview data diff 77562a --html diff.html

The images come from DVC's cache, or from the remote where the cache lacks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import objects
from flows.data_versions import Difference, Side, pictures
from flows.pictures import of_version
from tasks.pages import Pictures, render, thumbnail


def page(root: Path, found: Difference) -> str:
    """The page. Raises PipelineError if the checkout is no DVC project."""
    one, other = found.before, found.after
    with objects.opened(root) as stored:
        sources = {"before": of_version(stored, one.md5), "after": of_version(stored, other.md5)}
        kinds = [
            {
                "name": kind,
                "count": count,
                "examples": [_example(example, sources) for example in found.examples.get(kind, [])],
            }
            for kind, count in (
                ("added", found.added),
                ("removed", found.removed),
                ("changed", found.changed["records"]),
            )
        ]
    fields = {name: count for name, count in found.changed.items() if name != "records"}
    return render(
        "data_diff.html.j2",
        before=one,
        after=other,
        kinds=kinds,
        fields=", ".join(f"{name} {count:,}" for name, count in fields.items()),
        distributions=_distributions(found),
    )


def _distributions(found: Difference) -> list[dict[str, Any]]:
    one, other = found.before, found.after
    lengths = {
        "question": (one.question_length, other.question_length),
        "answer": (one.answer_length, other.answer_length),
    }
    made = [_distribution("Answers", "", one, other, one.answers, other.answers)]
    for name, means in lengths.items():
        bins = [(_bin(part), part) for part in found.lengths.get(name, [])]
        note = f"Mean {means[0]:.1f} → {means[1]:.1f}."
        counts = [{title: part[side] for title, part in bins} for side in ("before", "after")]
        made.append(_distribution(f"Length of the {name}, characters", note, one, other, *counts))
    made.append(_distribution("Splits", "", one, other, one.splits, other.splits))
    return made


def _bin(part: Mapping[str, int]) -> str:
    return f"{part['from']}" if part["from"] == part["to"] else f"{part['from']}–{part['to']}"


def _distribution(
    title: str, note: str, one: Side, other: Side, left: Mapping[str, int], right: Mapping[str, int]
) -> dict[str, Any]:
    """Rows of two bars: shares of the records of each version, the longest bar as wide as the figure."""
    names = dict.fromkeys([*left, *right])
    shares = {
        name: (left.get(name, 0) / max(1, one.records), right.get(name, 0) / max(1, other.records))
        for name in names
    }
    most = max((share for both in shares.values() for share in both), default=0.0) or 1.0
    rows = [
        {
            "name": name or "(empty)",
            "counts": (left.get(name, 0), right.get(name, 0)),
            "widths": [round(100 * share / most, 2) for share in shares[name]],
        }
        for name in names
    ]
    return {"title": title, "note": note, "rows": rows}


def _example(example: Mapping[str, Any], sources: Mapping[str, Pictures]) -> dict[str, Any]:
    sides = []
    for label, source in sources.items():
        record = example[label]
        if record:
            shown = [thumbnail(name, source) for name in pictures(record)]
            sides.append({"label": label, "record": record, "pictures": shown})
    return {"id": example["id"], "fields": example["fields"], "sides": sides}
