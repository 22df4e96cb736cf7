"""Images as parts of a chat message: data URLs, each read and encoded once.

pictures = Pictures("data", kept_bytes=2**29)
parts = pictures.held(["images/a.png"]) or pictures.read(["images/a.png"])
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from models.images import FORMATS, MAX_PIXELS, UNREADABLE, ImageError, ImageSource, decode_image, read_image

SENT_AS_THEY_ARE = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "GIF": "gif"}
EXIF_ORIENTATION = 0x0112


class Pictures:
    """Images as JSON parts of a message, each read and encoded once; beyond kept_bytes the ones not used for
    longest are let go."""

    def __init__(self, images: ImageSource | str | Path, kept_bytes: int) -> None:
        self._images, self._kept_bytes = images, kept_bytes
        self._parts: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def held(self, names: Sequence[str]) -> list[orjson.Fragment] | None:
        """The parts of these images; None if one must be read first."""
        with self._lock:
            if not all(name in self._parts for name in names):
                return None
            for name in names:
                self._parts.move_to_end(name)
            return [orjson.Fragment(self._parts[name]) for name in names]

    def read(self, names: Sequence[str]) -> list[orjson.Fragment]:
        """The parts of these images. Raises ImageError. For one thread at a time."""
        return [orjson.Fragment(self._part(name)) for name in names]

    def _part(self, name: str) -> bytes:
        with self._lock:
            if name in self._parts:
                return self._parts[name]
        part = orjson.dumps({"type": "image_url", "image_url": {"url": self._data_url(name)}})
        with self._lock:
            self._parts[name] = part
            self._bytes += len(part)
            while self._bytes > self._kept_bytes:
                self._bytes -= len(self._parts.popitem(last=False)[1])
        return part

    def _data_url(self, name: str) -> str:
        if name.startswith("data:image/"):  # the picture itself
            return name
        if not callable(self._images):
            return data_url(read_image(self._images, name), name)
        try:
            return _png_url(self._images(name))
        except ImageError:
            raise
        except Exception as error:  # a source is anybody's function
            raise ImageError(UNREADABLE, f"{name!r} ({type(error).__name__}: {error})") from error


def data_url(data: bytes, name: str) -> str:
    """An image file as a data URL: its own bytes if anybody sees in them what open_image gives, else a PNG of
    that. Raises ImageError."""
    kind = _sendable(data)
    if kind is None:
        return _png_url(decode_image(data, name))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _sendable(data: bytes) -> str | None:
    """Subtype of an image that needs no conversion: 8 bits, no transparency, upright, a format of the web."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            plain = image.mode in ("RGB", "L", "P") and "transparency" not in image.info
            if plain and image.width * image.height <= MAX_PIXELS:
                upright = image.getexif().get(EXIF_ORIENTATION, 1) == 1
                return SENT_AS_THEY_ARE.get(str(image.format)) if upright else None
    except Exception:  # decode_image says what is wrong
        return None
    return None


def _png_url(image: Any) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
