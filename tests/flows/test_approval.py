"""The end of a run: pushed, recorded, registered, approved, promoted; and killed in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from httpx import HTTPStatusError

from tests.support.accounts import refuse_deletes
from tests.support.commands import longview
from tests.support.mini import executed, flow_environment

pytestmark = pytest.mark.flows

DVC_YAML = """
stages:
  promote:
    cmd: python decide.py
    deps: [wanted.json, decide.py, data]
    outs: [artifacts/promote, artifacts/compare, artifacts/evaluate,
           artifacts/reasoning_sft, artifacts/summary_sft]
"""

# What the stages up to `promote` leave, in one: a candidate with real files and made-up figures.
DECIDE = """
import json
from pathlib import Path

wanted, name = json.loads(Path("wanted.json").read_text()), "multi_agent"
with open("control/executed.txt", "a") as file:
    file.write("promote 0\\n")

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

agents = {"reasoning": wanted["md5"] * 32, "summary": "5" * 32}
over = {**agents, "reasoning": wanted["over"] * 32} if wanted["over"] else None
gain = {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 400}
share = {"mean": 0.6, "low": 0.55, "high": 0.65, "n": 400}
decision = {"decision": wanted["decision"], "candidate": name, "candidate_agents": agents, "opponent": "base",
            "opponent_agents": over, "reasoning": gain, "perception": gain, "reason": f"{name} gains"}
write("artifacts/promote/decision.json", json.dumps(decision))
systems = {name: {"accuracy": dict.fromkeys(("reasoning", "perception", "validation"), share)}}
comparison = {"order": [name], "systems": systems, "rounds": {}}
write("artifacts/compare/comparison.json", json.dumps(comparison))
answer = {"id": "1", "split": "test", "set": "reasoning", "question": "?", "truth": "1", "answer": "1"}
write(f"artifacts/evaluate/{name}/predictions.jsonl", json.dumps({**answer, "right": True}) + "\\n")
inputs = {"artifacts/reasoning_sft/checkpoint": agents["reasoning"],
          "artifacts/summary_sft/checkpoint": agents["summary"]}
write(f"artifacts/evaluate/{name}/manifest.json", json.dumps({"inputs": inputs}))
write("artifacts/reasoning_sft/checkpoint/weights", wanted["md5"])
write("artifacts/summary_sft/checkpoint/weights", "5")
"""

KILLED = """
import os, signal, sys

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

from flows import retrain, versions
from mlflow import MlflowClient

if sys.argv[1] == "record":
    versions.record = kill
else:
    setattr(MlflowClient, sys.argv[1], kill)
retrain.retrain()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty MLflow store: the migration takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    from tasks import tracking

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        tracking.client()
    shutil.rmtree(folder / "mlruns", ignore_errors=True)
    return folder


@pytest.fixture
def gated(project: Path, store: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The miniature project as one stage that decides, with a registry and git."""
    from flows import approval

    monkeypatch.setenv("LONGVIEW_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setattr(approval, "POLL_S", 0.2)
    shutil.copytree(store, project / ".work/mlflow")
    with_gate(project)
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "decide.py").write_text(DECIDE)
    want(project, "1")
    (project / "control").mkdir(exist_ok=True)
    for command in (["add", "-A"], ["commit", "-qm", "x"]):
        named = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
        subprocess.run(["git", *named, *command], cwd=project, check=True)
    for key, value in (("user.name", "Ann"), ("user.email", "ann@example.org")):
        subprocess.run(["git", "config", key, value], cwd=project, check=True)
    return project


def want(project: Path, md5: str, decision: str = "promote", over: str = "") -> None:
    """What the stage is to decide, on which checkpoint, and against whose."""
    (project / "wanted.json").write_text(json.dumps({"md5": md5, "decision": decision, "over": over}))


def with_gate(project: Path, section: str = "{}") -> None:
    """params.yaml with this section `promote`."""
    before = (project / "params.yaml").read_text().partition("promote:")[0]
    (project / "params.yaml").write_text(f"{before}promote: {section}\n")


def with_approval(project: Path, timeout_h: float = 1 / 60, default: str = "keep") -> None:
    with_gate(project, f"{{approval: {{timeout_h: {timeout_h}, default: {default}}}}}")


def run() -> dict[str, Any]:
    from flows.retrain import retrain

    return retrain()


def registry() -> Any:
    from tasks.registry import Registry

    return Registry()


def killed(project: Path, server: str, *, at: str) -> None:
    """A run that is killed when it is about to make this call."""
    environment = {**flow_environment(project), "LONGVIEW_TRACKING": "on", "PREFECT_API_URL": server}
    with (project / "control/flow.log").open("ab") as log:
        command = [sys.executable, "-c", KILLED, at]
        done = subprocess.run(command, cwd=project, env=environment, stdout=log, stderr=log, timeout=120)
    assert done.returncode == -signal.SIGKILL, (project / "control/flow.log").read_text()[-3000:]


def paused() -> Any:
    """The flow run that waits for its form, once Prefect has it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import ObjectNotFound

    found = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            for each in client.read_flow_runs(flow_run_filter=found):
                with suppress(ObjectNotFound, HTTPStatusError):
                    schema = client.read_flow_run_input(each.id, "paused-approval-schema")
                    text = client.read_flow_run_input(each.id, "paused-approval-description")
                    return each, json.loads(schema), json.loads(text)
            time.sleep(0.2)
    raise AssertionError("no run is paused")


def meanwhile(act: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """A run, and what somebody does once it is paused."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(copy_context().run, act)  # Prefect's settings
        done = run()
        return other.result(), done


def summary_artifact() -> str:
    """What was said of the last run that did something."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter
    from prefect.client.schemas.sorting import ArtifactSort

    wanted = ArtifactFilter.model_validate({"key": {"any_": ["summary"]}})
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC)
    return str(found[0].data)


def answer(decision: str) -> tuple[str, str, str]:
    """Fill in the form; before that, wrongly."""
    from prefect.client.orchestration import get_client

    found, schema, text = paused()
    with get_client(sync_client=True) as client:
        wrong = client.resume_flow_run(found.id, run_input={"decision": "perhaps", "reason": "", "who": "Bo"})
        right = {"decision": decision, "reason": "looked at forty", "who": "Bo"}
        client.resume_flow_run(found.id, run_input=right)
    return str(wrong.status), json.dumps(schema), text


def test_a_person_approves_on_the_form(gated: Path) -> None:
    with_approval(gated)
    (refused, schema, text), done = meanwhile(lambda: answer("promote"))
    assert "REJECT" in refused and '"promote", "keep"' in schema
    assert (
        "version 1 (multi_agent)" in text and "60.0 (55.0–65.0)" in text and "+10.0 (+5.0 to +15.0)" in text
    )
    champion = registry().champion()
    assert champion.tags["run"] == done["tag"] and registry().waiting() is None
    (change,) = registry().history()
    assert (change.how, change.who, change.reason) == ("approval", "Bo", "looked at forty")
    assert "multi_agent is champion now" in summary_artifact()


def test_a_person_rejects_by_the_command_and_is_not_asked_again(
    gated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_deletes(monkeypatch)  # it need not be who registered the first candidate
    with_approval(gated)

    def reject() -> Any:
        paused()
        return longview("model", "approve", "--reject", "--reason", "misreads sevens")

    said, _ = meanwhile(reject)
    assert said.exit_code == 0 and "the paused run goes on" in said.output, said.output
    assert registry().champion() is None and registry().challenger().declined.reason == "misreads sevens"
    (gated / "decide.py").write_text(DECIDE + "# changed\n")
    run()
    assert executed(gated) == ["promote", "promote"] and registry().champion() is None
    assert longview("model", "promote", "1", "--reason", "after all").exit_code == 0
    assert registry().champion().number == "1" and registry().challenger() is None


def test_nobody_answers_and_the_default_is_taken(gated: Path) -> None:
    with_approval(gated, timeout_h=1 / 3600, default="promote")
    run()
    (change,) = registry().history()
    assert change.how == "time-out" and "nobody decided" in change.reason
    assert registry().champion().number == "1" and registry().waiting() is None


def test_a_wait_outlives_the_run_and_takes_the_answer_left_for_it(gated: Path, prefect_server: str) -> None:
    with_approval(gated)
    environment = {**flow_environment(gated), "LONGVIEW_TRACKING": "on", "PREFECT_API_URL": prefect_server}
    with (gated / "control/flow.log").open("ab") as log:
        command = [sys.executable, "-m", "flows.retrain"]
        flow = subprocess.Popen(command, cwd=gated, env=environment, stdout=log, stderr=log)
    found, *_ = paused()
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    shown = longview("status").output
    assert "waits     version 1 (multi_agent)" in shown and "keep if nobody decides before" in shown
    assert registry().waiting().awaiting.run == str(found.id)
    answer("promote")  # Prefect does not know yet that nobody reads it
    run()
    (change,) = registry().history()
    assert (change.after, change.who) == ("1", "Bo") and registry().waiting() is None
    late = longview("model", "approve", "--reason", "fine")
    assert late.exit_code == 1 and "nothing waits" in late.output


def test_a_decision_made_by_hand_is_pushed_before_it_is_carried_out(
    gated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import pipeline, retrain, settled, versions

    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=gated, check=True)
    made = versions.record(gated, versions.Facts("x.dir", "embedded"))  # as by a run that was killed then
    pushed = []
    monkeypatch.setattr(pipeline, "push", lambda root: pushed.append(registry().champion()) or 1)
    done = run()
    assert done["ran"] == [] and made and done["tag"] == made.tag
    assert pushed == [None] and registry().champion().number == "1", "pushed, and then champion"
    assert settled.is_settled(gated) and retrain.carried_out(gated)
    run()
    assert len(pushed) == 1


def test_status_and_compare_ask_for_the_model_of_params_yaml_and_do_without_mlflow(
    gated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gate(gated, "{model: receipts, alias: live}")
    run()
    assert registry().champion() is None
    assert "champion  version 1 (multi_agent)" in longview("status").output
    assert json.loads(longview("compare", "--json").output)["champion"] == "version 1 (multi_agent)"
    (gated / "no.db").write_text("no database")
    for away, words in (("http://127.0.0.1:1", "does not answer"), (f"sqlite:///{gated}/no.db", "database")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
        found = longview("compare", "--json")
        assert found.exit_code == 0 and json.loads(found.stdout)["champion"] is None, found.output
        assert f"note: the champion is not known: MLflow at {away}" in found.stderr and words in found.stderr
        status = longview("status")
        assert status.exit_code == 0 and "champion  unknown: MLflow at" in status.output


def test_until_makes_no_champion_without_a_version(gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows import settled
    from flows.retrain import retrain

    done = retrain(until="promote")
    assert done["ran"] == ["promote"] and done["tag"] is None and settled.LEFT in capsys.readouterr().out
    assert "next: `longview run` makes it a version" in summary_artifact()
    again = longview("run", "--until", "promote")
    assert (
        again.exit_code == 0 and "everything is up to date" in again.output and settled.LEFT in again.output
    )
    assert registry().versions() == [] and not settled.is_settled(gated)
    whole = run()
    champion = registry().champion()
    assert champion.tags["run"] == whole["tag"] and champion.tags["commit"]


def test_list_and_roll_back(gated: Path) -> None:
    for md5, over in (("1", ""), ("2", "1")):
        want(gated, md5, over=over)
        run()
    want(gated, "3", "keep", over="2")
    run()
    rows = json.loads(longview("model", "list", "--json").output)
    assert [(row["version"], row["aliases"]) for row in rows] == [
        ("3", ["challenger"]),
        ("2", ["champion"]),
        ("1", []),
    ]
    assert rows[0]["accuracy"]["reasoning"]["mean"] == 0.6 and rows[0]["run"].startswith("run/")
    shown = longview("model", "list").output
    assert "60.0 (55.0–65.0)" in shown and "challenger" in shown
    assert longview("model", "rollback", "--reason", "misreads sevens").exit_code == 0
    assert registry().champion().number == "1"
    first = longview("model", "rollback", "--reason", "x")
    assert first.exit_code == 1 and "is the first champion" in first.output
    history = longview("model", "list", "--history").output.splitlines()
    assert [line.split("  ")[1] for line in history] == ["none → 1", "1 → 2", "2 → 1"]
    assert "Ann <ann@example.org>  misreads sevens" in history[-1]

    for folder in (".dvc/cache", ".work/remote"):
        shutil.rmtree(gated / folder)
    lost = longview("model", "promote", "2", "--reason", "x")
    assert lost.exit_code == 1 and "neither DVC's cache nor the remote" in lost.output
    assert "git worktree add ../then run/" in lost.output and registry().champion().number == "1"
    assert "there are: 1, 2, 3" in longview("model", "promote", "9", "--reason", "x").output


def test_killed_between_the_steps_the_next_run_finishes(gated: Path, prefect_server: str) -> None:
    from flows import settled, versions

    with_approval(gated, 1, "keep")
    (gated / "params.yaml").write_text(
        (gated / "params.yaml").read_text().split("promote:")[0] + "promote: {}\n"
    )
    killed(gated, prefect_server, at="record")
    assert list((gated / ".work/remote").rglob("*.dir")), "pushed first"
    assert versions.versions(gated) == [] and registry().versions() == []
    killed(gated, prefect_server, at="set_registered_model_alias")
    (version,) = versions.versions(gated)
    (candidate,) = registry().versions()
    assert (candidate.tags["run"], candidate.tags["commit"]) == (version.tag, version.commit)
    assert registry().champion() is None and not settled.is_settled(gated)
    assert run()["tag"] == version.tag
    champion = registry().champion()
    assert champion == candidate and champion.tags["who"] == "Ann <ann@example.org>"
    assert len(registry().history()) == len(registry().versions()) == len(versions.versions(gated)) == 1
    assert settled.is_settled(gated) and executed(gated) == ["promote"]
