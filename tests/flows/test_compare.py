"""Generations and runs side by side, and the page of flipped questions: real git and DVC, made-up answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows import compare, versions
from flows.versions import Facts
from tasks import compare as stage
from tasks import flips, side_by_side
from tasks.side_by_side import WORKSPACE, Champion, Generation
from tests.support.commands import longview
from tests.support.results_data import predictions

DVC_YAML = """
stages:
  evaluate:
    foreach: [base, r1]
    do:
      cmd: cp -r made/${item} artifacts/evaluate/${item}
      deps: ["made/${item}", "artifacts/rounds/${item}/checkpoint", artifacts/summary_sft/checkpoint]
      outs: ["artifacts/evaluate/${item}"]
"""
ROUND = {"reward": {"mean": 53.3, "margin_mean": 99.0}, "pairs": {"kept": 291, "dropped": {"all_right": 158}}}


def call(project: Path, *command: str) -> None:
    subprocess.run(command, cwd=project, check=True, capture_output=True)


def make_run(project: Path, accuracies: dict[str, float], ids: str = "") -> versions.RunVersion:
    rows = {name: predictions(share, ids=ids) for name, share in accuracies.items()}
    for name, answers in rows.items():
        folder = project / "made" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        for place in (f"rounds/{name}", "summary_sft"):
            checkpoint = project / "artifacts" / place / "checkpoint"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "weights").write_text(f"{place} {accuracies[name] if name in place else ''}")
    call(project, sys.executable, "-m", "dvc", "repro", "-q")
    call(project, sys.executable, "-m", "dvc", "push", "-q")
    found = stage.run(rows, {"r1": ROUND}, resamples=200, seed=0)
    for path, content in (
        (compare.COMPARISON, found),
        (compare.DECISION, {"decision": "keep", "candidate": "r1"}),
    ):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(json.dumps(content))
    made = versions.record(project, Facts("ab12.dir", "embedded"))
    assert made
    return made


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    call(tmp_path, "git", "init", "-q")
    call(tmp_path, sys.executable, "-m", "dvc", "init", "-q")
    call(
        tmp_path, sys.executable, "-m", "dvc", "remote", "add", "-d", "-q", "local", str(tmp_path / ".remote")
    )
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / ".gitignore").write_text("/artifacts\n/made\n/.remote\n")
    (tmp_path / "artifacts/evaluate").mkdir(parents=True)
    monkeypatch.setenv("LONGVIEW_ROOT", str(tmp_path))
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_generations_of_the_checkout_with_paired_differences(project: Path) -> None:
    assert "nothing is compared yet" in longview("compare").output
    make_run(project, {"base": 0.5, "r1": 0.6})
    found = json.loads(longview("compare", "--json").output)
    assert [row["name"] for row in found["rows"]] == ["base", "r1"]
    assert found["rows"][1]["previous"]["mean"] == pytest.approx(0.1) and found["rows"][1]["policy"] == "base"
    said = longview("compare").output
    assert "against the one before" in said and "all_right 158" in said and "53.3" in said
    assert "r1 (candidate)" in said
    text = longview("compare", "--markdown", "-").output
    assert text.startswith("**r1: 60.0") and "points against base" in text
    assert "|  | base | r1 (candidate) |\n" in text and "| reasoning, % | 50.0 (" in text
    md5s = [next(iter(row["checkpoints"].values())) for row in found["rows"]]
    assert len(set(md5s)) == 2 and found["rows"][1]["policy_md5"] == md5s[0]
    assert f"| checkpoint | {md5s[0][:8]} | {md5s[1][:8]} |" in text and f"base {md5s[0][:8]}" in text


def test_runs_are_read_from_the_cache_or_the_remote_and_paired_where_questions_are_the_same(
    project: Path,
) -> None:
    first = make_run(project, {"base": 0.5, "r1": 0.6})
    second = make_run(project, {"base": 0.5, "r1": 0.7})
    other = make_run(project, {"base": 0.5, "r1": 0.8}, ids="new-")
    shutil.rmtree(project / ".dvc/cache")
    rows = json.loads(longview("compare", first.tag, second.tag, other.tag, "--json").output)["rows"]
    assert [(row["run"], row["name"]) for row in rows] == [(run.tag, "r1") for run in (first, second, other)]
    assert rows[1]["previous"]["mean"] == pytest.approx(0.1) and rows[2]["previous"] is None
    every = json.loads(longview("compare", first.tag, second.tag, "--rounds", "--json").output)["rows"]
    assert [row["name"] for row in every] == ["base", "r1", "base", "r1"]
    assert "no run version 'nothing'" in longview("compare", "nothing").output


def test_the_page_shows_what_flipped_and_escapes_what_models_write(project: Path, tmp_path: Path) -> None:
    make_run(project, {"base": 0.5, "r1": 0.6})
    page = project / "out/flips.html"
    said = longview("compare", "--html", str(page), "--between", "base", "r1")
    assert said.exit_code == 0 and "40 won, 0 lost" in said.output
    assert page.read_text().count("<article>") == 40 and "the picture cannot be shown" in page.read_text()
    assert "2 generations of that name" not in said.output
    assert (
        "0 generations of that name"
        in longview("compare", "--html", str(page), "--between", "base", "r9").output
    )
    old, new = ({**predictions(1.0)[0], "right": right, "reasoning": "<script>"} for right in (True, False))
    text = flips.page(flips.flips([old], [new]), "r1", "r2", flips.Source(lambda name: b""))
    assert "&lt;script&gt;" in text and "<script>" not in text and "right → wrong: 1" in text


def test_the_champion_is_marked_and_the_verdict_is_of_the_candidate() -> None:
    def generation(name: str, share: float, **values: Any) -> Generation:
        rows = predictions(share)
        found = stage.run({name: rows}, {}, resamples=100, seed=0)["systems"][name]
        return Generation(WORKSPACE, name, "ab12.dir", found, {}, None, rows=rows, **values)

    found = [
        generation("base", 0.5),
        generation("r1", 0.6, checkpoints={"a": "1", "summary": "9"}),
        generation("r2", 0.7, checkpoints={"b": "2", "summary": "9"}, candidate=True),
        generation("r3", 0.6, checkpoints={"c": "3", "summary": "9"}),
    ]
    rows = side_by_side.lines(found, Champion("version 1 (r1)", predictions(0.6), frozenset(("1", "9"))))
    assert [row.is_champion for row in rows] == [False, True, False, False]
    said = side_by_side.verdict(rows)
    assert said.startswith("r2: 70.0") and "+20.0" in said and "against base; +10.0" in said
    assert "against the champion" in said
    alone = side_by_side.verdict(side_by_side.lines(found[:2], None))
    assert alone.startswith("r1: 60.0") and "champion" not in alone


def test_the_p_of_a_column_are_those_of_as_many_tests() -> None:
    """Holm 1979: sorted, times the number of tests that are left, and never falling."""
    found = side_by_side.adjusted([None, {"p": 0.01}, {"p": 0.04}, {"p": 0.03}, {"p": 0.005}])
    assert [test and round(test["p_holm"], 6) for test in found] == [None, 0.03, 0.06, 0.06, 0.02]


def test_the_flow_leaves_the_table_in_prefect(project: Path, prefect_server: str) -> None:
    from prefect.artifacts import Artifact

    make_run(project, {"base": 0.5, "r1": 0.6})
    compare.compare()
    found = Artifact.get("generations")
    assert found and found.description and found.description.startswith("r1: 60.0")
    rows = json.loads(str(found.data))
    assert [row["generation"] for row in rows] == ["base", "r1 (candidate)"]
    assert list(rows[0]) == list(side_by_side.HEAD) and rows[1]["dropped"] == "all_right 158"
