"""Safe opening of an image file: under its root, its size checked before it is decoded, RGB in the end.

    python -c "from models.images import open_image; print(open_image('data', 'images/x.png').size)"

Image files are untrusted. A path may leave its folder, a header may promise ten thousand megapixels, a name
may be a pipe that never ends: every such file raises ImageError, whose `reason` is one of the REASONS.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
"""Width x height allowed by default: 150 MB once decoded."""
MAX_BYTES = 256 * 2**20
"""Size of an image file allowed by default."""
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
"""Formats that are read, and their extension. Others are refused (PostScript runs a program)."""

OUTSIDE = "image outside the folder"
MISSING = "image missing"
UNREADABLE = "image unreadable"
TOO_MANY_PIXELS = "image too many pixels"
TOO_LARGE = "image file too large"
REASONS = (OUTSIDE, MISSING, UNREADABLE, TOO_MANY_PIXELS, TOO_LARGE)


class ImageError(ValueError):
    """An image that cannot be used: `reason` is one of REASONS, the message also says which image and why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image says: format (a key of FORMATS), width and height in pixels."""

    format: str
    width: int
    height: int


def resolve_image(root: str | Path, relative: str) -> Path:
    """The regular file `relative` under `root`, links followed; ImageError if outside or not there."""
    named_from_a_root = Path(relative).is_absolute() or PureWindowsPath(relative).drive or "://" in relative
    if not relative or "\0" in relative or named_from_a_root:
        raise ImageError(OUTSIDE, f"{_shown(relative)} is not a path relative to the folder")
    base = Path(root).resolve()
    try:
        path = (base / relative).resolve()
        mode = path.stat().st_mode if path.is_relative_to(base) else None
    except (OSError, RuntimeError, ValueError) as error:  # not there, loops of links, long names, surrogates
        raise ImageError(MISSING, f"{_shown(relative)} ({type(error).__name__})") from error
    if mode is None:
        raise ImageError(OUTSIDE, f"{_shown(relative)} leads out of the folder")
    if not stat.S_ISREG(mode):
        raise ImageError(MISSING, f"{_shown(relative)} is not a file")
    return path


def read_image(root: str | Path, relative: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of an image file under `root`."""
    path = resolve_image(root, relative)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ImageError(UNREADABLE, f"{_shown(relative)} ({error.strerror})") from error
    if len(data) > max_bytes:
        raise ImageError(TOO_LARGE, f"{_shown(relative)} has more than {max_bytes:,} bytes")
    return data


def inspect_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode an image fully to prove that it is whole, and return what it is."""
    image = _load(data, name, max_pixels)
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with a second one behind it
    return ImageInfo(kind, *image.size)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image:
    """RGB image of these bytes: turned as EXIF says, transparency on white, 16-bit grey scaled to 8."""
    from PIL import ImageOps

    image = _load(data, name, max_pixels)
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken EXIF block
        raise ImageError(UNREADABLE, f"{_shown(name)} ({error})") from error


def open_image(root: str | Path, relative: str, max_pixels: int = MAX_PIXELS) -> Image:
    """RGB image at `relative` under `root`; ImageError with its reason when it cannot be used."""
    return decode_image(read_image(root, relative), relative, max_pixels)


def _load(data: bytes, name: str, max_pixels: int) -> Image:
    """First frame, decoded, its header checked first. Pillow's own bound (179 Mpx) holds as well."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=list(FORMATS))
        if image.width * image.height > max_pixels:
            raise ImageError(TOO_MANY_PIXELS, f"{_shown(name)} is {image.width} x {image.height}")
        image.load()
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(TOO_MANY_PIXELS, f"{_shown(name)} ({error})") from error
    except Exception as error:  # Pillow's decoders raise nearly every type on broken input
        raise ImageError(UNREADABLE, f"{_shown(name)} ({error or type(error).__name__})") from error
    return image


def _rgb(image: Image) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB")


def _shown(name: Any) -> str:
    text = str(name).encode("utf-8", "backslashreplace").decode()
    return repr(text if len(text) <= 120 else text[:117] + "...")


ImageSource = Callable[[str], "Image"]
"""Opens a picture by its name in a record."""


def folder_images(root: str | Path, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Pictures by their path under a folder."""
    return lambda name: open_image(root, name, max_pixels)


def data_and_instruct_images(data: str | Path, instruct: str | Path) -> ImageSource:
    """Pictures of data/ by path (`images/x.png`), and of a MIMIC-IT parquet by image id (no slash in it)."""
    from models.base64_images import ParquetImages

    stored = ParquetImages(Path(instruct) / "images.parquet")
    files = folder_images(data)
    return lambda name: files(name) if "/" in name else decode_image(stored[name], name)
