"""Benchmarks that run pipelines: plans, folders and comparisons, without running one.

pytest tests/unit/test_benchmark_runs.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import ablation, reproduce, workspace

# ablation


def test_the_time_left_comes_from_earlier_steps(tmp_path: Path) -> None:
    pace = ablation.Pace(tmp_path / "pace.json", "tiny")
    assert pace.left(["dpo"]) == "time left unknown until steps have run once"
    with pace.timed("dpo"):
        pass
    again = ablation.Pace(tmp_path / "pace.json", "tiny")
    again.seconds = {"tiny/dpo": [100.0, 140.0], "tiny/sample": [3600.0]}
    assert again.left(["dpo", "sample"]) == "about 1 h 02 min left"
    assert again.left(["dpo", "judge"]) == "more than 2 min left"
    assert ablation.Pace(tmp_path / "pace.json", "tiny").seconds["tiny/dpo"]
    assert ablation.Pace(tmp_path / "pace.json", "embedded").left(["dpo"]).startswith("time left unknown")


def test_a_step_that_fails_teaches_no_pace(tmp_path: Path) -> None:
    pace = ablation.Pace(tmp_path / "pace.json", "tiny")
    with pytest.raises(RuntimeError), pace.timed("dpo"):
        raise RuntimeError
    assert pace.seconds == {}


def test_adopted_folders_go_by_their_seed_and_must_be_complete(tmp_path: Path) -> None:
    def folder(name: str, seed: int) -> Path:
        for system in ("base", "multi_agent", "r1"):
            (tmp_path / name / "artifacts/evaluate" / system).mkdir(parents=True)
            (tmp_path / name / "artifacts/evaluate" / system / "predictions.jsonl").touch()
        (tmp_path / name / "params.yaml").write_text(f"seed: {seed}\nrounds: {{r1: {{t: 1, policy: x}}}}\n")
        return tmp_path / name

    a, b = folder("a", 0), folder("b", 4)
    assert ablation.adopt([a, b]) == {0: a, 4: b}
    assert ablation.common_rounds({0: a, 4: b}) == ["r1"]
    with pytest.raises(workspace.WorkspaceError, match="same seed, 0"):
        ablation.adopt([a, folder("c", 0)])
    (b / "artifacts/evaluate/r1/predictions.jsonl").unlink()
    with pytest.raises(workspace.WorkspaceError, match="no predictions of r1"):
        ablation.adopt([b])


# reproduce


def test_outputs_are_compared_by_md5_and_none_may_be_missing() -> None:
    lock = [{"outs": [{"path": "data", "md5": "1.dir"}]}, {"outs": [{"path": "artifacts/a", "md5": "2.dir"}]}]
    first = reproduce.recorded(lock)
    assert first == {"data": "1.dir", "artifacts/a": "2.dir"}
    assert reproduce.differing(first, dict(first)) == []
    assert reproduce.differing(first, {"data": "9.dir", "artifacts/b": "3.dir"}) == [
        "artifacts/a",
        "artifacts/b",
        "data",
    ]


def test_a_differing_checkpoint_misses_the_target() -> None:
    first = {"data": "1.dir", "artifacts/sft": "2.dir"}
    rows, table = reproduce.judge([first, {**first, "artifacts/sft": "3.dir"}], ["artifacts/sft"], [1, 2])
    assert [(row.value, row.unit, row.holds) for row in rows[:2]] == [(1, "of 1", True), (0, "of 1", False)]
    assert [row[-1] for row in table.rows] == ["NO", "yes"]
    rows, _ = reproduce.judge([first, first], ["artifacts/sft"], [1, 2])
    assert all(row.holds for row in rows[:2]) and rows[2].target is None
    rows, _ = reproduce.judge([first, first], ["artifacts/sft"], [2])
    assert [row.what for row in rows[2:]] == ["whole pipeline from a fresh clone, second run"]


def test_only_a_run_with_the_same_seed_and_profile_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text("profile: embedded\nseed: 3\n")
    monkeypatch.setattr(workspace, "waiting", lambda folder: ["curate"])
    with pytest.raises(workspace.WorkspaceError, match="has seed 3 and profile embedded"):
        reproduce.accept(tmp_path, 0, None)
    with pytest.raises(workspace.WorkspaceError, match="curate are stale"):
        reproduce.accept(tmp_path, 3, None)


def test_kills_are_spread_over_the_run() -> None:
    found = reproduce.moments(5, 6.0, seed=1)
    assert found == reproduce.moments(5, 6.0, seed=1) != reproduce.moments(5, 6.0, seed=2)
    assert len(found) == 5 and all(18 <= seconds <= 102 for seconds in found)


def test_differing_files_are_named(tmp_path: Path) -> None:
    for name, weight in (("a", "1"), ("b", "2")):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint/w").write_text(weight)
        (tmp_path / name / "same").write_text("x")
    (tmp_path / "b/more").touch()
    assert reproduce.differing_files(tmp_path / "a", tmp_path / "b") == ["checkpoint/w", "more"]


# workspace


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=folder, check=True)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with parameters and somebody's dvc.lock; building data is left out."""
    monkeypatch.setattr(workspace, "execute", lambda *_, **__: None)
    folder = tmp_path / "source"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles/embedded.yaml").write_text("profile: embedded\nseed: 0\nrounds: 2\n")
    (folder / "params.yaml").write_text(
        "# mine\nprofile: embedded\nseed: 0  # of all\nrounds: {r1: {t: 1}}\n"
    )
    (folder / "dvc.lock").write_text("committed")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return folder


def test_a_workspace_is_the_commit_with_its_own_seed_and_no_lock(source: Path, tmp_path: Path) -> None:
    (source / "params.yaml").write_text("not committed")
    made = workspace.make(tmp_path / "w", 3, source=source)
    assert (made / "params.yaml").read_text() == "# mine\nprofile: embedded\nseed: 3\nrounds: {r1: {t: 1}}\n"
    assert not (made / "dvc.lock").exists()


def test_made_again_it_follows_the_commit_and_keeps_what_ran(source: Path, tmp_path: Path) -> None:
    made = workspace.make(tmp_path / "w", 3, source=source)
    lock = "schema: '2.0'\nstages: {}\n"
    (made / "dvc.lock").write_text(lock)
    (made / "artifacts/rounds/r1").mkdir(parents=True)
    (made / "artifacts/rounds/r2").mkdir(parents=True)
    (source / "new.py").write_text("x = 1\n")
    git(source, "add", "-A")
    git(source, "commit", "-qm", "y")
    workspace.make(made, 3, source=source)
    assert (made / "new.py").is_file() and (made / "dvc.lock").read_text() == lock
    assert "seed: 3" in (made / "params.yaml").read_text()
    assert [path.name for path in (made / "artifacts/rounds").iterdir()] == ["r1"]
    workspace.make(made, 3, profile_name="embedded", rounds=2, source=source)
    assert "policy: artifacts/rounds/r1/dpo" in (made / "params.yaml").read_text()


def test_nothing_of_the_checkouts_settings_reaches_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "LONGVIEW_PARENT_RUN_ID", "PYTHONPATH", "GIT_DIR", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "elsewhere")
    found = workspace.environment(tmp_path, {"LONGVIEW_TRACKING": "off"})
    assert "elsewhere" not in found.values()
    assert found["LONGVIEW_ROOT"] == str(tmp_path) and found["LONGVIEW_TRACKING"] == "off"


def test_one_benchmark_a_folder(tmp_path: Path) -> None:
    with (
        workspace.alone(tmp_path),
        pytest.raises(workspace.WorkspaceError, match="another benchmark"),
        workspace.alone(tmp_path),
    ):
        pass
    with workspace.alone(tmp_path):
        pass


def test_a_file_without_one_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: {seed: 1}\n")
    with pytest.raises(workspace.WorkspaceError, match="found 0"):
        workspace.set_seed(tmp_path / "params.yaml", 1)
