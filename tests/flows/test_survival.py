"""Runs that survive, or stop when told to: cancelled, resumed, servers away, a full disk, killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from flows.parent_run import read_note
from tests.support.mini import executed, flow_environment

pytestmark = pytest.mark.flows


def wait_for(what: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("timed out waiting")


def longview(project: Path, server: str, *arguments: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own; its output is in control/longview.log."""
    with (project / "control/longview.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=project,
            env={**flow_environment(project), "PREFECT_API_URL": server},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def said(project: Path) -> str:
    return (project / "control/longview.log").read_text()


def cancel(run: str) -> None:
    """What *Cancel* in the UI does."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Cancelling())  # type: ignore[arg-type]


def state(run: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state  # type: ignore[arg-type]


def test_cancelled_in_prefect_it_stops_within_seconds_and_resumes(project: Path, prefect_server: str) -> None:
    hang = project / "control/dpo@r3.hang"
    hang.touch()
    flow = longview(project, prefect_server, "run", "--rounds", "3", "--until", "dpo")
    wait_for(lambda: "dpo@r3" in executed(project))
    family = psutil.Process(flow.pid).children(recursive=True)
    run = read_note(project)["flow_run_id"]
    cancel(run)
    began = time.monotonic()
    assert flow.wait(30) == 1 and time.monotonic() - began < 15
    assert not any(process.is_running() for process in family)
    assert "cancelled" in said(project) and "Traceback" not in said(project)
    assert state(run).is_cancelled()
    hang.unlink()
    again = longview(project, prefect_server, "run", "--resume")
    assert again.wait(120) == 0, said(project)
    assert "rounds 3, until dpo" in said(project) and "1 stages run" in said(project)
    assert executed(project).count("dpo@r3") == 2 and "compare" not in executed(project)
    assert longview(project, prefect_server, "run", "--resume").wait(60) == 1
    assert "nothing to resume" in said(project)


def test_what_a_killed_run_had_published_is_not_made_again(project: Path, prefect_server: str) -> None:
    """Killed after the stage had published, before DVC recorded it; then also while DVC linked the output."""
    from flows import pipeline
    from flows.retrain import retrain

    retrain(until="side")
    key = pipeline.inputs_key(project, "side")
    lock = project / "dvc.lock"
    whole = lock.read_text()
    md5 = YAML(typ="safe").load(whole)["stages"]["side"]["outs"][0]["md5"]
    for harm in (lambda: None, (project / "artifacts/side/table.md").unlink):
        note = project / ".work/published/side.json"
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps({"key": key, "md5": md5}))
        lock.write_text("schema: '2.0'\nstages: {}\n")
        harm()
        shutil.rmtree(project / ".dvc/cache/runs")
        assert retrain(until="side")["restored"] == ["side"]
        assert executed(project).count("side") == 1 and lock.read_text() == whole
    (project / "artifacts/side/table.md").write_text("other")
    note.write_text(json.dumps({"key": "other inputs", "md5": md5}))
    assert retrain(until="side")["restored"] == ["side"], "by DVC"
    assert not note.exists()


@pytest.mark.parametrize("file", ["run.json.part", "dvc.lock.kept.part"])
def test_a_full_disk_is_named_and_the_next_run_continues(
    project: Path, prefect_server: str, file: str
) -> None:
    from flows.interruption import Interrupted
    from flows.retrain import retrain

    part = project / ".work" / file
    part.parent.mkdir(parents=True, exist_ok=True)
    part.symlink_to("/dev/full")
    with pytest.raises(Interrupted, match="disk is full"):
        retrain(until="first")
    part.unlink(missing_ok=True)
    assert retrain(until="first")["ran"] in (["first"], [])
