"""Looks at a URL that data/ came from, in the way of edits, failures and kills: real DVC and Prefect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows import data, data_watch
from flows.data_watch import NOTE, read_note, write_note

pytestmark = pytest.mark.flows
RECORDS = Path("data/records.jsonl")


@pytest.fixture
def source(project: Path, prefect_server: str, tmp_path: Path) -> Path:
    """A folder that the project's data/ came from by `dvc import-url`, and that holds other answers since."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 9)).save(folder / f"{number}.png")
        row = {"id": number, "image": f"{number}.png", "question": "How many?", "answer": "2"}
        rows.append(json.dumps(row) + "\n")
    (folder / "records.jsonl").write_text("".join(rows))
    shutil.rmtree(project / "data")
    (project / "data.dvc").unlink()
    data.dvc(project, "import-url", "--quiet", str(folder), "data")
    assert look()["announced"]
    (folder / "records.jsonl").write_text("".join(rows).replace('"2"', '"3"'))
    return folder


def look() -> dict[str, Any]:
    return data_watch.data_watch.fn()


def test_an_edited_data_is_not_replaced(project: Path, source: Path) -> None:
    version = data.version(project)
    (project / RECORDS).write_text("edited by hand\n")
    with pytest.raises(data.DataError, match=r"data/ is not what data\.dvc says"):
        look()
    assert (project / RECORDS).read_text() == "edited by hand\n" and data.version(project) == version
    data.dvc(project, "checkout", "--force", "data.dvc")
    assert look()["updated"]


def test_what_a_killed_look_imported_is_checked_before_it_is_announced(
    project: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import recovery

    def kill(_: Path) -> None:
        raise KeyboardInterrupt

    before = data.version(project)
    (source / "records.jsonl").write_text("nonsense\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_watch, "problem", kill)
        look()
    assert data.version(project) != before
    with recovery.exclusive(project):
        found = look()
    assert found["busy"] and not found["announced"]
    found = look()
    assert "data.dvc" in found["refused"] and found["version"] == before and not found["announced"]
    assert '"2"' in (project / RECORDS).read_text()
    assert not look()["refused"], "once is enough"


@pytest.mark.parametrize("content", ["half\n", None])
def test_half_an_update_is_begun_again_and_loses_nothing(
    project: Path, source: Path, content: str | None
) -> None:
    """As after a kill in the midst of `dvc update`, and an edit since."""
    before = (project / "data.dvc").read_text()
    write_note(project, read_note(project), found="0123", before=before)
    shutil.rmtree(project / "data")
    if content:
        (project / "data").mkdir()
        (project / RECORDS).write_text(content)
    found = look()
    assert found["updated"] and found["announced"] and '"3"' in (project / RECORDS).read_text()
    aside = project / ".work/data_watch" / RECORDS
    assert aside.read_text() == content if content else not aside.exists()
    assert "before" not in json.loads((project / ".work" / NOTE).read_text())


def test_an_update_that_fails_leaves_the_data_as_it_was(
    project: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, version = data.dvc, data.version(project)

    def fail(root: Path, *arguments: str, **options: Any) -> int:
        if arguments[0] == "update":
            shutil.rmtree(root / "data")
            raise data.DataError("the network is down")
        return real(root, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(data.DataError, match="the network is down"):
        patch.setattr(data, "dvc", fail)
        look()
    assert data.version(project) == version and data.is_current(project)
    assert look()["updated"]
    assert (project / f".work/data_import/{version}.pointer").is_file(), "the way back"
