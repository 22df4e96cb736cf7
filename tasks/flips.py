"""The questions that flipped between two generations: wrong before and right now, and the other way round.

    python -c "from tasks.flips import flips; print(flips([], []))"

A gain of two points may be thirty questions won and fifteen lost: the page shows which, with the chains.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.images import ImageError, decode_image, read_image
from models.results import Rows

PIXELS = 160
SHOWN = 200
"""Of each direction; the page says how many there are."""
Pictures = Callable[[str], bytes]
"""The bytes of an image by its name in a record. Raises OSError or ImageError."""


@dataclass(frozen=True)
class Flips:
    """Pairs of predictions (before, after) of the same question, in the order of the later file."""

    won: list[tuple[Any, Any]]
    lost: list[tuple[Any, Any]]


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


def pictures_of(folder: Path) -> Pictures:
    """The images below a folder; no name leads out of it."""
    return lambda name: read_image(folder, name)


def page(found: Flips, before: str, after: str, pictures: Pictures) -> str:
    """One self-contained HTML page; everything that a model or a person wrote is escaped."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    template = environment.get_template("flips.html.j2")
    sections = [
        {"title": title, "count": len(rows), "rows": [_shown(*pair, pictures) for pair in rows[:SHOWN]]}
        for title, rows in (("wrong → right", found.won), ("right → wrong", found.lost))
    ]
    return template.render(before=before, after=after, sections=sections, shown=SHOWN)


def _shown(old: Any, new: Any, pictures: Pictures) -> dict[str, Any]:
    names: Sequence[str] = new.get("images") or [new.get("image")]
    return {
        "id": new["id"],
        "family": new.get("family") or "",
        "question": new["question"],
        "truth": new["truth"],
        "pictures": [thumbnail(name, pictures) for name in names if name],
        "sides": [old, new],
    }


def thumbnail(name: str, pictures: Pictures) -> str | None:
    """The image as a data URI, at most PIXELS wide and high; None if it cannot be had or read."""
    try:
        picture = decode_image(pictures(name), name)
    except (OSError, ImageError):
        return None
    picture.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
