"""A folder that is removed is never half there under its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from models.folders import drop


def test_killed_while_it_removes_it_leaves_no_part_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, remove = tmp_path / "steps", shutil.rmtree
    (folder / "checkpoint-2").mkdir(parents=True)

    def killed(path: Path, **options: object) -> None:
        if Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        drop(folder)
    assert not folder.exists()
    monkeypatch.setattr(shutil, "rmtree", remove)
    folder.mkdir()
    drop(folder)
    assert list(tmp_path.iterdir()) == []
