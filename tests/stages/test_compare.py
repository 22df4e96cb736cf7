"""The comparison of systems: pytest tests/stages/test_compare.py."""

import json
from pathlib import Path

import pytest

from models import results
from models.results import ResultsError
from tasks import compare
from tests.support.results_data import predictions, round_metrics, write_rounds, write_system


def systems():
    return {
        "base": predictions(0.40, 0.90, 0.40, reasons=False),
        "multi_agent": predictions(0.60, 0.91, 0.58),
        "r1": predictions(0.66, 0.90, 0.65),
    }


def compared(rows=None):
    return compare.run(rows or systems(), {"r1": round_metrics(1)}, resamples=2000, seed=0)


def test_accuracy_intervals_and_paired_differences():
    found = compared()["systems"]
    reasoning = found["multi_agent"]["accuracy"]["reasoning"]
    assert (reasoning["mean"], reasoning["n"], reasoning["failures"]) == (0.6, 400, 1)
    assert reasoning["low"] < 0.6 < reasoning["high"]
    assert found["r1"]["accuracy"]["perception"]["n"] == 200
    assert found["base"]["against"] == {}
    assert found["multi_agent"]["against"]["previous"]["system"] == "base"
    against = found["r1"]["against"]
    assert against["base"]["reasoning"]["mean"] == pytest.approx(0.26)
    assert (against["previous"]["system"], against["previous"]["reasoning"]["mean"]) == ("multi_agent", 0.06)
    assert against["previous"]["reasoning"]["low"] > 0 > against["previous"]["perception"]["mean"]


def test_reasoning_by_answer_counts_every_reasoned_question():
    found = compared()["systems"]
    assert found["base"]["two_by_two"] is None and found["base"]["reasoning_tokens"] is None
    counts = found["multi_agent"]["two_by_two"]
    assert sum(counts.values()) == 400
    assert counts["reasoning_right_answer_right"] == 192 and counts["reasoning_wrong_answer_right"] == 48


def test_families_and_rounds_are_pulled():
    found = compared()
    families = found["systems"]["r1"]["families"]
    assert set(families) == {"row_sum", "count", "parity"} and sum(f["n"] for f in families.values()) == 400
    assert found["rounds"]["r1"]["agreement"]["auc"] == 0.81


def test_systems_that_answered_different_questions_are_not_compared():
    rows = systems()
    rows["r1"] = rows["r1"][1:]
    with pytest.raises(ResultsError, match="dvc repro"):
        compared(rows)


def test_empty_sets_give_no_number():
    rows = {name: [row for row in own if row["set"] == "reasoning"] for name, own in systems().items()}
    found = compared(rows)
    assert found["systems"]["r1"]["accuracy"]["perception"]["mean"] is None
    assert found["systems"]["r1"]["against"]["base"]["perception"]["mean"] is None
    assert "| – |" in results.table(found)
    json.dumps(found, allow_nan=False)


def test_the_stage_ignores_rounds_that_are_no_longer_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    write_rounds(1)
    for name, rows in systems().items():
        write_system(name, rows)
    write_system("r2", predictions(0.99))
    compare.main()
    found = json.loads(Path("artifacts/compare/comparison.json").read_text())
    assert found["order"] == ["base", "multi_agent", "r1"]
    table = Path("artifacts/compare/table.md").read_text()
    assert table in capsys.readouterr().out and "| r1 | 66.0 (" in table
    first = Path("artifacts/compare/comparison.json").read_bytes()
    compare.main()
    assert Path("artifacts/compare/comparison.json").read_bytes() == first
