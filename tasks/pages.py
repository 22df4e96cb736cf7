"""Self-contained HTML pages: the templates beside this file, and images that are part of the page.

python -c "from tasks.pages import thumbnail; help(thumbnail)"
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.images import ImageError, decode_image

PIXELS = 160
Pictures = Callable[[str], bytes]
"""The bytes of an image by its name in a record. Raises OSError or ImageError."""


def render(template: str, **values: Any) -> str:
    """A page of tasks/templates. Everything that a model or a person wrote is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def thumbnail(name: str, pictures: Pictures) -> dict[str, Any] | None:
    """The image as a data URI, at most PIXELS wide and high, and whether it is `small` as it is; None if it
    cannot be had or read."""
    try:
        picture = decode_image(pictures(name), name)
    except (OSError, ImageError):
        return None
    small = max(picture.size) <= PIXELS
    picture.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"uri": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), "small": small}
