"""What MLflow shows of a run, written to a real local store and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows import run_view
from flows.versions import Facts
from tasks import compare, promote, tracking
from tasks import run_view as view
from tests.support.results_data import predictions, write_rounds, write_system

SHARES = {"base": 0.4, "multi_agent": 0.5, "r1": 0.6, "r2": 0.7}
MADE = ("run/20261123-1a2b3c4d", "c" * 40)
FACTS = Facts("ab12cd34ef.dir", "tiny")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose stages have run, with a store of its own and the candidate registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGVIEW_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    write_rounds(1, 2)
    for name, share in SHARES.items():
        write_system(
            name, predictions(share, 0.9, share, reasons=name != "base"), checkpoint_md5=f"{name:0>32}.dir"
        )
    (tmp_path / "data/images").mkdir(parents=True)
    Image.new("RGB", (48, 48), "white").save(tmp_path / "data/images/0.png")
    (tmp_path / "artifacts/report").mkdir(parents=True)
    (tmp_path / run_view.REPORT).write_text("<p>report</p>")
    compare.main()
    promote.main([])
    monkeypatch.setenv("LONGVIEW_TRACKING", "on")
    assert promote.apply(promote.Params())
    return tmp_path


def test_the_run_is_useful_as_it_opens(checkout: Path) -> None:
    client: Any = tracking.client()
    experiment = tracking.experiment_id(client)
    run_id = client.create_run(experiment, run_name="retrain").info.run_id
    for _ in range(2):  # a second time changes nothing
        run_view.write.fn(str(checkout), run_id, FACTS, MADE)

    found = client.search_runs([experiment], "tags.`longview.decision` = 'promote'")
    assert [run.info.run_id for run in found] == [run_id]
    tags = found[0].data.tags
    assert tags["longview.candidate"] == "r2" and tags["longview.data_version"] == FACTS.data
    assert tags["longview.version"] == MADE[0] and tags["longview.commit"] == MADE[1]
    note = tags["mlflow.note.content"]
    assert note.startswith("**r2: 70.0") and "| reasoning, % | 40.0 (" in note
    assert "r2 passes the gate" in note and f"longview explain r2 --at {MADE[0]}" in note

    history = client.get_metric_history(run_id, "by_round/accuracy_reasoning")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    low = client.get_metric_history(run_id, "by_round/accuracy_reasoning_low")
    assert all(point.value < mean.value for point, mean in zip(low, history, strict=True))
    for name in ("reward", "margin", "pairs_kept", "pairs_dropped_tie", "judge_auc", "length_chosen_words"):
        assert [point.step for point in client.get_metric_history(run_id, f"by_round/{name}")] == [1, 2]

    files = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert files == {view.PAGE, view.TABLE, view.TEXT, "report.html"}
    page = Path(client.download_artifacts(run_id, view.PAGE)).read_text()
    assert page.count("<article>") == 80 and "wrong → right" in page and "data:image/png" in page
    table = client.load_table(experiment, view.TABLE, [run_id])
    assert list(table["generation"]) == ["base", "multi_agent", "r1", "r2 (candidate)"]
    said = client.get_model_version_by_alias(tracking.REGISTERED_MODEL, "champion").description
    assert said.startswith("**r2: 70.0") and "| reasoning | 70.0 (" in said and "trained from r1" in said
    assert client.get_registered_model(tracking.REGISTERED_MODEL).description == view.ABOUT


def test_a_note_of_many_rounds_fits_into_a_tag(checkout: Path) -> None:
    from flows import compare as comparing

    found = comparing.make(checkout, [])
    rows = [*found.rows[:1], *found.rows[1:] * 40]
    decision = json.loads((checkout / comparing.DECISION).read_text())
    facts = view.Facts(FACTS.data, FACTS.profile, decision)
    note = view.description(view.Comparison(rows, None, found.verdict), facts)
    assert len(note) <= view.MOST and "Earlier rounds" in note and note.rstrip().endswith("```")
