"""What a large folder was seen to hold: any change of a file, or of DVC's rules, makes it unknown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import seen

MD5 = "0" * 32 + ".dir"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files in a checkout, noted."""
    monkeypatch.setenv("LONGVIEW_ROOT", str(tmp_path))
    made = tmp_path / "data"
    (made / "images").mkdir(parents=True)
    (made / "images/1.png").write_bytes(b"one")
    (made / "records.jsonl").write_bytes(b"{}\n")
    noted = seen.numbers(str(made))
    assert noted and sorted(noted) == ["images/1.png", "records.jsonl"]
    seen.keep(str(made), MD5, noted)
    return made


def known(folder: Path) -> str | None:
    found = seen.numbers(str(folder))
    return None if found is None else seen.known(str(folder), found)


def overwrite_with_the_same_size(folder: Path) -> None:
    path = folder / "images/1.png"
    before = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(before + 1, before + 1))


def replace_at_the_same_time(folder: Path) -> None:
    path, part = folder / "images/1.png", folder / "images/1.part"
    part.write_bytes(b"two")
    os.utime(part, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    part.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": overwrite_with_the_same_size,
    "replaced": replace_at_the_same_time,
    "added": lambda folder: (folder / "images/2.png").touch(),
    "removed": lambda folder: (folder / "records.jsonl").unlink(),
    "ignored": lambda folder: (folder.parent / ".dvcignore").write_text("*.png\n"),
    "linked": lambda folder: (folder / "more").symlink_to(folder.parent),
    "gone": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


def test_known_while_nothing_changes(folder: Path) -> None:
    assert known(folder) == MD5
    assert known(folder / "images") is None


@pytest.mark.parametrize("change", CHANGES)
def test_unknown_after_a_change(folder: Path, change: str) -> None:
    CHANGES[change](folder)
    assert known(folder) is None


def test_a_note_cut_in_half_is_none(folder: Path) -> None:
    (note,) = (folder.parent / ".work/seen").iterdir()
    note.write_bytes(note.read_bytes()[:20])
    assert known(folder) is None
