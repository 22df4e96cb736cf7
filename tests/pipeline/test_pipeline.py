"""The whole pipeline at the tiny profile, in a fresh clone, through the real Prefect, DVC and MLflow.

python -m pytest tests/pipeline -m pipeline
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import commands, dvc_deps
from tests.support.imports import REPOSITORY

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1000)]

MISSING = [
    module
    for module in {dvc_deps.module_of(body) for body in dvc_deps.stages(dvc_deps.load()).values()}
    if not (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
]


def environment() -> dict[str, str]:
    """Nothing of the checkout under test leaks into the clone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LONGVIEW_", "PREFECT_", "MLFLOW_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def longview(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return commands.run(command, cwd=clone, env=environment(), timeout_s=900)


def left_behind(clone: Path) -> list[list[str]]:
    """Processes of the clone that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(clone):
                found.append(process.cmdline())
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the working tree that git knows or would take, as a repository of their own."""
    if MISSING:
        pytest.skip(f"not written yet: {', '.join(sorted(MISSING))}")
    folder = tmp_path_factory.mktemp("pipeline") / "clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def finished(clone: Path) -> Path:
    """The clone after one run of the tiny profile."""
    done = longview(clone, "run", "--profile", "tiny", "--force")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert not left_behind(clone)
    return clone


def states(clone: Path) -> dict[str, Any]:
    from flows import pipeline

    return pipeline.states(clone)


def test_every_stage_is_up_to_date_and_has_a_manifest(finished: Path) -> None:
    found = states(finished)
    assert {s.state for s in found.values()} == {"up to date"}, found
    from flows import pipeline

    for stage in pipeline.stages(finished):
        for out in stage.outs:
            manifest = json.loads((finished / out / "manifest.json").read_text())
            assert manifest["stage"] and manifest["inputs"], out


def test_results_are_there(finished: Path) -> None:
    assert (finished / "artifacts/compare/table.md").read_text().strip()
    assert json.loads((finished / "artifacts/promote/decision.json").read_text())
    assert (finished / "artifacts/report/report.html").is_file()
    shown = longview(finished, "report")
    assert shown.returncode == 0 and "report.html" in shown.stdout


def test_mlflow_has_a_run_a_stage_under_the_flows_run(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished}/.work/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("longview")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [r for r in runs if r.data.tags.get("longview.kind") == "flow"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1 and {r.info.status for r in runs} == {"FINISHED"}
    assert len(children) == len(states(finished))
    assert client.search_logged_models([experiment.experiment_id])


def test_running_again_does_nothing(finished: Path) -> None:
    done = longview(finished, "run")
    assert done.returncode == 0 and "everything is up to date" in done.stdout


def test_dvc_alone_agrees(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--dry"],
        cwd=finished,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Running stage" not in done.stdout, done.stdout


def test_everything_is_in_the_remote(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--cloud"],
        cwd=finished,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "in sync" in done.stdout, done.stdout


def test_status_says_so(finished: Path) -> None:
    shown = longview(finished, "status")
    assert shown.returncode == 0 and "stale" not in shown.stdout and "missing" not in shown.stdout
