"""Images from hostile folders: paths that leave, headers that promise too much, files that are no images."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image

from models.images import (
    MISSING,
    OUTSIDE,
    TOO_LARGE,
    TOO_MANY_PIXELS,
    UNREADABLE,
    ImageError,
    inspect_image,
    open_image,
    read_image,
)


def _png(size=(4, 3), mode="RGB", color=None):
    buffer = io.BytesIO()
    Image.new(mode, size, color if color is not None else 7).save(buffer, "PNG")
    return buffer.getvalue()


def _promising_png(width, height):
    """A PNG whose header promises width x height and that holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(_png())
    (tmp_path / "secret.png").write_bytes(_png())
    return folder


def _reason(root, name, **limits):
    with pytest.raises(ImageError) as error:
        open_image(root, name, **limits)
    return error.value.reason


def test_opens_as_rgb(root):
    image = open_image(root, "images/a.png")
    assert (image.mode, image.size) == ("RGB", (4, 3))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "images/../../secret.png",
        "/etc/passwd",
        "",
        "C:\\x.png",
        "file:///x.png",
        "https://x/y.png",
        "a\0b",
    ],
)
def test_paths_that_leave_the_folder(root, name):
    assert _reason(root, name) == OUTSIDE


def test_an_absolute_path_into_the_folder_is_refused_too(root):
    assert _reason(root, str(root / "images" / "a.png")) == OUTSIDE


def test_links_count_by_where_they_lead(root):
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "in.png").symlink_to(root / "images" / "a.png")
    (root / "folder").symlink_to(root.parent, target_is_directory=True)
    (root / "loop.png").symlink_to(root / "loop.png")
    assert _reason(root, "out.png") == OUTSIDE
    assert _reason(root, "folder/secret.png") == OUTSIDE
    assert _reason(root, "loop.png") == MISSING
    assert open_image(root, "in.png").size == (4, 3)


def test_things_that_are_not_there_or_not_files(root):
    os.mkfifo(root / "pipe.png")
    for name in ("none.png", "images", "pipe.png", "x" * 5000, "\ud800.png", "images/a.png/b"):
        assert _reason(root, name) == MISSING


@pytest.mark.parametrize(
    "data", [b"", b"not an image", _png()[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_broken_files(root, data):
    (root / "bad.png").write_bytes(data)
    assert _reason(root, "bad.png") == UNREADABLE


def test_the_size_is_checked_before_decoding(root):
    (root / "bomb.png").write_bytes(_promising_png(60_000, 60_000))
    (root / "large.png").write_bytes(_promising_png(9_000, 9_000))
    (root / "allowed.png").write_bytes(_promising_png(9_000, 900))
    assert _reason(root, "bomb.png") == TOO_MANY_PIXELS
    assert _reason(root, "large.png") == TOO_MANY_PIXELS
    assert _reason(root, "large.png", max_pixels=80_999_999) == TOO_MANY_PIXELS
    assert _reason(root, "allowed.png") == UNREADABLE
    assert _reason(root, "images/a.png", max_pixels=11) == TOO_MANY_PIXELS
    assert open_image(root, "images/a.png", max_pixels=12).size == (4, 3)


def test_file_size_is_bounded(root):
    with pytest.raises(ImageError) as error:
        read_image(root, "images/a.png", max_bytes=20)
    assert error.value.reason == TOO_LARGE


def test_modes_become_rgb_without_surprises(root):
    deep = Image.new("I;16", (1, 1))
    deep.putpixel((0, 0), 200 * 256)
    deep.save(root / "deep.png")
    Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(root / "clear.png")
    Image.new("L", (1, 1), 9).save(root / "grey.png")
    assert open_image(root, "deep.png").getpixel((0, 0)) == (200, 200, 200)
    assert open_image(root, "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(root, "grey.png").getpixel((0, 0)) == (9, 9, 9)


def test_photos_are_turned_as_their_exif_says(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(root / "turned.jpg", exif=exif)
    assert open_image(root, "turned.jpg").size == (2, 4)


def test_a_phone_picture_with_two_jpegs_is_a_jpeg(root):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 2))])
    assert inspect_image(buffer.getvalue(), "phone.jpg").format == "JPEG"
