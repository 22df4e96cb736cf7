"""The note of a lease on GPU slots, as kills and full disks leave it."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from flows import devices


@pytest.mark.parametrize("content", [b"", b"2f1c9a", b"\xff\xfe"])
def test_a_note_that_is_none_is_removed(content: bytes, tmp_path: Path) -> None:
    note = tmp_path / ".work" / devices.NOTE
    note.parent.mkdir()
    note.write_bytes(content)
    assert devices._noted(tmp_path) is None and not note.exists()
    assert devices._noted(tmp_path) is None


def test_a_lease_is_written_down_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = uuid4()
    devices._note(tmp_path, first)
    write = Path.write_text

    def full(path: Path, *_: object, **__: object) -> int:
        write(path, "")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        devices._note(tmp_path, uuid4())
    assert devices._noted(tmp_path) == first
