"""The flow on a miniature project: real Prefect, real DVC, trivial stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.parent_run import read_note
from tests.support.mini import executed, flow_environment

pytestmark = pytest.mark.flows
ALL = ["first", "side", "dpo@r1", "dpo@r2", "compare"]


def run(**options: Any) -> dict[str, Any]:
    from flows.retrain import retrain

    return retrain(**options)


def start(project: Path, server: str, until: str) -> subprocess.Popen[bytes]:
    """The flow in a process of its own, to be killed."""
    log = (project / "control/flow.log").open("ab")
    environment = {**flow_environment(project), "PREFECT_API_URL": server}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.retrain", "--until", until],
        cwd=project,
        env=environment,
        stdout=log,
        stderr=log,
    )


def wait_for(what: Any, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("timed out waiting")


def stage_pid(project: Path, stage: str) -> int | None:
    path = project / "control/executed.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in reversed(lines) if line.startswith(f"{stage} ")), None)


def test_runs_every_stage_once_and_then_nothing(project: Path, prefect_server: str) -> None:
    first = run()
    assert sorted(first["ran"]) == sorted(ALL) and first["pushed"] > 0
    assert executed(project).index("dpo@r1") < executed(project).index("dpo@r2")
    assert executed(project)[-1] == "compare"
    second = run()
    assert second["ran"] == [] and sorted(second["skipped"]) == sorted(ALL)
    assert len(executed(project)) == len(ALL)
    assert list((project / ".work/remote").rglob("*.dir"))


def test_until_runs_only_what_the_stage_needs(project: Path, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client

    assert run(until="dpo@r1")["ran"] == ["first", "dpo@r1"]
    with get_client(sync_client=True) as client:
        keys = {artifact.key for artifact in client.read_artifacts()}
    assert "round-r1" in keys


def test_another_round_runs_only_itself_and_what_follows(project: Path, prefect_server: str) -> None:
    run()
    assert run(rounds=3)["ran"] == ["dpo@r3", "compare"]
    fewer = run(rounds=2)
    assert fewer["ran"] == [] and fewer["restored"] == ["compare"]
    assert not (project / "artifacts/rounds/r3").exists()


def test_failure_names_the_stage_its_log_and_what_to_do(project: Path, prefect_server: str) -> None:
    from flows.stage import StageFailed

    (project / "control/side.fail").write_text("No space left on device")
    with pytest.raises(StageFailed) as caught:
        run(until="side")
    message = str(caught.value)
    assert "stage 'side'" in message and ".work/logs/side.log" in message and "the disk is full" in message
    assert executed(project).count("side") == 1, "not a failure that another attempt cures"
    assert "flow_run_id" not in read_note(project), "the next run would call it killed"
    (project / "control/side.fail").unlink()
    assert run(until="side")["ran"] == ["side"]


def test_transient_failure_is_tried_again(
    project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import stage

    monkeypatch.setattr(stage.run_stage, "retry_delay_seconds", 0)
    (project / "control/side.fail").write_text("Connection reset by peer")
    with pytest.raises(stage.StageFailed):
        run(until="side")
    assert executed(project).count("side") == 1 + stage.RETRIES


def test_stage_that_takes_too_long_is_ended(project: Path, prefect_server: str) -> None:
    from flows.stage import StageFailed

    (project / "control/side.hang").touch()
    with pytest.raises(StageFailed, match="still running after 4 s"):
        run(until="side", stage_timeout_s=4)
    pid = stage_pid(project, "side")
    assert pid and not psutil.pid_exists(pid)


def test_kill_the_flow_and_run_again(project: Path, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    hang, began = project / "control/dpo@r1.hang", datetime.now(UTC)
    hang.touch()
    flow = start(project, prefect_server, "dpo@r1")
    pid = wait_for(lambda: stage_pid(project, "dpo@r1"))
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    wait_for(lambda: not psutil.pid_exists(pid), 20)  # its stage does not go on without it
    hang.unlink()
    done = run(until="dpo@r1")
    assert done["ran"] == ["dpo@r1"] and done["skipped"] == ["first"]
    assert executed(project).count("first") == 1 and executed(project).count("dpo@r1") == 2
    going = FlowRunFilter.model_validate(
        {"state": {"type": {"any_": ["RUNNING"]}}, "start_time": {"after_": began}}
    )
    with get_client(sync_client=True) as client:
        assert not client.read_flow_runs(flow_run_filter=going), "neither the killed run nor its rounds"


def test_kill_the_stage_and_run_again(project: Path, prefect_server: str) -> None:
    hang = project / "control/dpo@r1.hang"
    hang.touch()
    flow = start(project, prefect_server, "dpo@r1")
    os.kill(wait_for(lambda: stage_pid(project, "dpo@r1")), signal.SIGKILL)
    assert flow.wait(60) == 1
    assert "stage 'dpo@r1'" in (project / "control/flow.log").read_text()
    hang.unlink()
    assert run(until="dpo@r1")["ran"] == ["dpo@r1"]


def test_killed_supervisor_leaves_no_stage_behind(project: Path, prefect_server: str) -> None:
    hang = project / "control/side.hang"
    hang.touch()
    flow = start(project, prefect_server, "side")
    pid = wait_for(lambda: stage_pid(project, "side"))
    family = psutil.Process(flow.pid).children(recursive=True)
    supervisor = next(p for p in family if "flows.dvc_server" in p.cmdline())
    supervisor.kill()
    assert flow.wait(60) == 1
    wait_for(lambda: not psutil.pid_exists(pid), 20)


def test_second_run_beside_a_living_one_is_refused(project: Path, prefect_server: str) -> None:
    from flows.recovery import BusyError

    (project / "control/side.hang").touch()
    flow = start(project, prefect_server, "side")
    try:
        wait_for(lambda: stage_pid(project, "side"))
        with pytest.raises(BusyError, match=str(flow.pid)):
            run()
    finally:
        flow.terminate()
        flow.wait()


def test_input_changed_meanwhile_is_refused(project: Path, prefect_server: str) -> None:
    from flows import walk
    from flows.retrain import InputsChanged

    original = walk.Walk.visit

    def change_afterwards(self: walk.Walk, stage: Any) -> Any:
        outcome = original(self, stage)
        if stage.name == "compare":
            (project / "stage.py").write_text((project / "stage.py").read_text() + "# changed\n")
        return outcome

    walk.Walk.visit = change_afterwards  # type: ignore[method-assign]
    try:
        with pytest.raises(InputsChanged, match="first"):
            run()
    finally:
        walk.Walk.visit = original  # type: ignore[method-assign]


def unreachable(root: Path) -> int:
    from flows import pipeline

    raise pipeline.PipelineError("the remote is away")


def run_without_a_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import pipeline, retrain

    with monkeypatch.context() as away:
        away.setattr(pipeline, "push", unreachable)
        away.setattr(retrain.push, "retries", 0)
        with pytest.raises(pipeline.PipelineError):
            run()


def test_what_could_not_be_pushed_is_pushed_by_the_next_run(
    project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_without_a_remote(monkeypatch)
    assert read_note(project)["unfinished"]
    again = run()
    assert again["ran"] == [] and again["pushed"] > 0
    assert run()["pushed"] == 0


def test_what_was_made_by_hand_is_pushed_before_it_is_a_version(
    project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import pipeline, versions

    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=project, check=True)
    run_without_a_remote(monkeypatch)
    assert versions.versions(project) == []
    done = run()
    assert done["ran"] == [] and done["pushed"] > 0 and done["tag"]
    assert list((project / ".work/remote").rglob("*.dir"))
    monkeypatch.setattr(pipeline, "push", unreachable)
    assert run()["tag"] == done["tag"], "nothing is left to push"


def test_a_killed_run_leaves_no_temporary_server(project: Path) -> None:
    from flows import recovery

    (project / "control/first.hang").touch()
    with (project / "control/flow.log").open("ab") as log:
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain"],
            cwd=project,
            env=flow_environment(project),
            stdout=log,
            stderr=log,
        )
    wait_for(lambda: stage_pid(project, "first"), 120)
    servers = [p for p in psutil.Process(flow.pid).children() if "server" in " ".join(p.cmdline())]
    assert servers
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    recovery.clean(project)
    assert not any(server.is_running() for server in servers)


def test_whole_data_that_the_cache_lost_is_committed_again(project: Path, prefect_server: str) -> None:
    import shutil

    run(until="side")
    for folder in (".dvc/cache", ".work/remote"):
        shutil.rmtree(project / folder)
    run(until="side")
    assert list((project / ".dvc/cache").rglob("*.dir"))


def test_data_that_is_not_what_data_dvc_says_is_refused(project: Path, prefect_server: str) -> None:
    from flows.data import DataError

    (project / "data/records.jsonl").write_text("edited\n")
    with pytest.raises(DataError, match="dvc checkout"):
        run()


def test_missing_data_comes_back_from_the_remote(project: Path, prefect_server: str) -> None:
    import shutil

    run(until="side")
    shutil.rmtree(project / "data")
    shutil.rmtree(project / ".dvc/cache")
    run(until="side")
    assert (project / "data/records.jsonl").is_file()
