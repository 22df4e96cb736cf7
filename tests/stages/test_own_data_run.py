"""Every stage on an imported folder: real training of a tiny model, fake engines where models are sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from models.records import read_jsonl
from tasks.data_import import import_folder
from tests.stages.test_dry_run import STAGES, run
from tests.support.fake_boards import Engines, make_workspace


def own_folder(boards: Path, folder: Path) -> Path:
    """The questions of a boards data set as somebody's own: JSONL and conversations, no pool or family."""
    shutil.copytree(boards / "images", folder / "photos")
    plain, talks = [], []
    for number, row in enumerate(read_jsonl(boards / "records.jsonl")):
        image = row["images"][0].replace("images/", "photos/", 1)
        if row["split"] == "train" and number % 2:
            said = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"])]
            turns = [{"from": who, "value": text} for who, text in said]
            talks.append({"id": f"c{number}", "image": image, "conversations": turns, "split": "train"})
        else:
            kept = {key: row[key] for key in ("question", "answer", "split", "set")}
            plain.append({"id": f"q{number}", "image": image, **kept})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (folder / "talks.json").write_text(json.dumps(talks))
    return folder


def test_every_stage_runs_on_an_imported_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    checkout = make_workspace(tmp_path / "checkout")
    monkeypatch.chdir(checkout)
    source = own_folder(checkout / "data", tmp_path / "own")
    shutil.rmtree(checkout / "data")
    Repo.init(str(checkout), no_scm=True).close()
    import_folder(source, checkout)
    monkeypatch.setattr("tasks.engines.open_engine", Engines("data/records.jsonl"))
    for module, arguments, out in STAGES:
        run(module, arguments)
        assert (checkout / "artifacts" / out / "manifest.json").is_file(), out
    answered = list(read_jsonl("artifacts/evaluate/r1/predictions.jsonl"))
    assert {row["split"] for row in answered} == {"validation", "test"}
    trained = json.loads(Path("artifacts/rounds/r1/dpo/metrics.json").read_text())
    assert trained, "a round has trained on own data"
