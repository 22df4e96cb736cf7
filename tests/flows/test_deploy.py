"""Deployments, triggers, GPU slots, notifications: a real Prefect server and worker, real DVC, a webhook."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.mini import REPOSITORY, executed, flow_environment

pytestmark = pytest.mark.flows


@pytest.fixture
def deployed(project: Path, prefect_server: str) -> Path:
    """A miniature project with the files that deployments are made from, on a server that has none yet."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
    shutil.copy(REPOSITORY / "prefect.yaml", project / "prefect.yaml")
    shutil.copytree(REPOSITORY / "deploy", project / "deploy")
    return project


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook on this machine, and what it has received."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", received
    server.shutdown()


def wait_for(what: Callable[[], Any], timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("timed out waiting")


def deploy(root: Path, **options: Any) -> dict[str, str]:
    """What `longview deploy` does, by name."""
    from flows import deploy
    from flows.registration import Options

    return dict(deploy.deploy(root, Options(gpus=2, **options)).lines)


def read(name: str) -> Any:
    """A deployment of the server."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(f"{name}/{name}")


def runs(name: str) -> list[Any]:
    """The runs of a deployment."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs(limit=200) if run.deployment_id == read(name).id]


def texts(received: list[dict[str, Any]]) -> list[str]:
    return [message["text"] for message in received]


def make_source(folder: Path, answer: str = "2") -> Path:
    """A data set that can be imported."""
    from PIL import Image

    (folder / "photos").mkdir(parents=True)
    rows = []
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 9)).save(folder / f"photos/{number}.png")
        row = {"id": number, "image": f"photos/{number}.png", "question": "How many?", "answer": answer}
        rows.append(json.dumps(row) + "\n")
    (folder / "records.jsonl").write_text("".join(rows))
    return folder


def test_deploying_twice_changes_nothing(deployed: Path) -> None:
    first = deploy(deployed, cron="0 3 * * *", timezone="Europe/Zurich", drop="/inbox")
    assert first["retrain/retrain"] == "created"
    before = read("retrain"), read("data-watch")
    assert set(deploy(deployed).values()) == {"unchanged"}
    assert (read("retrain"), read("data-watch")) == before
    retrain, watch = before
    assert retrain.schedules[0].schedule.cron == "0 3 * * *"
    assert retrain.global_concurrency_limit.limit == 1
    assert watch.parameters == {"drop": "/inbox"} and watch.schedules[0].schedule.interval.seconds == 300
    rounds = retrain.parameter_openapi_schema["properties"]["rounds"]
    assert {"type": "integer", "minimum": 1, "maximum": 99} in rounds["anyOf"]
    off = deploy(deployed, cron="off", drop="off")
    assert off["retrain/retrain"] == off["data-watch/data-watch"] == "changed"
    assert not read("retrain").schedules and not read("data-watch").parameters


@pytest.mark.parametrize("kind", ["process", "docker"])
def test_another_checkout_takes_deployments_over_only_when_told_to(
    deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from flows.registration import DeployError, place_of

    deploy(deployed, cron="0 3 * * *", infrastructure=kind)
    before = read("retrain")
    other = shutil.copytree(deployed, tmp_path / "other")
    monkeypatch.setenv("LONGVIEW_ROOT", str(other))
    monkeypatch.chdir(other)
    with pytest.raises(DeployError, match="--force") as refused:
        deploy(other, cron="off")
    assert str(deployed) in str(refused.value) and str(other) in str(refused.value)
    assert read("retrain") == before
    assert deploy(other, force=True)["retrain/retrain"] == "changed"
    assert place_of(read("retrain").job_variables) == str(other) and read("retrain").schedules
    assert set(deploy(other).values()) == {"unchanged"}


def test_a_server_that_forgets_reservations_is_pointed_out(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows import deploy as deployments
    from flows.commands.deploy import deploy as command

    command(gpus=1)
    assert "warning" not in capsys.readouterr().err  # set as `longview up` sets it
    in_memory = "prefect.server.concurrency.lease_storage.memory"
    answer = SimpleNamespace(json=lambda: {"server": {"concurrency": {"lease_storage": in_memory}}})
    assert deployments.forgets_reservations(SimpleNamespace(request=lambda *_: answer))
    monkeypatch.setattr(deployments, "forgets_reservations", lambda _: True)
    command(gpus=1)
    assert "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE" in capsys.readouterr().err


def test_a_schedule_makes_runs(deployed: Path) -> None:
    """As the server's scheduler makes them, which a temporary server does not start."""
    from prefect.client.orchestration import get_client

    deploy(deployed, cron="0 3 * * *")
    with get_client(sync_client=True) as client:
        path = {"id": str(read("retrain").id)}
        client.request("POST", "/deployments/{id}/schedule", path_params=path, json={"min_runs": 1})
    assert runs("retrain")[0].next_scheduled_start_time.hour == 3


def test_what_was_switched_off_in_the_ui_stays_off(deployed: Path) -> None:
    from prefect.client.orchestration import get_client

    deploy(deployed, cron="0 3 * * *")
    retrain = read("retrain")
    with get_client(sync_client=True) as client:
        client.update_deployment_schedule(retrain.id, retrain.schedules[0].id, active=False)
        (trigger,) = client.read_resource_related_automations(f"prefect.deployment.{retrain.id}")
        client.pause_automation(trigger.id)
        assert set(deploy(deployed).values()) == {"unchanged"}
        deploy(deployed, infrastructure="docker")
        deploy(deployed, infrastructure="process")
        assert not client.read_automation(trigger.id).enabled
    assert not read("retrain").schedules[0].active


def test_prefect_deploy_registers_the_same(deployed: Path, prefect_server: str) -> None:
    deploy(deployed)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**flow_environment(deployed), "PREFECT_API_URL": prefect_server, "PWD": str(deployed)}
    done = subprocess.run(command, cwd=deployed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(deploy(deployed).values()) == {"unchanged"}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_container_pools_are_accepted_and_kept(deployed: Path, kind: str) -> None:
    from jsonschema import Draft202012Validator
    from prefect.client.orchestration import get_client

    deploy(deployed, infrastructure=kind, image="longview:1")
    assert set(deploy(deployed).values()) == {"unchanged"}
    retrain = read("retrain")
    assert retrain.work_pool_name == f"longview-{kind}" and retrain.job_variables["image"] == "longview:1"
    with get_client(sync_client=True) as client:
        template = client.read_work_pool(retrain.work_pool_name).base_job_template
    Draft202012Validator(template["variables"]).validate(retrain.job_variables)
    used = set(template["variables"]["properties"])
    assert {name for name in used if f"{{{{ {name} }}}}" in json.dumps(template["job_configuration"])} == used
    deploy(deployed, infrastructure="process")
    assert read("retrain").work_pool_name == "longview"


def test_good_data_is_imported_announced_and_trained_on(deployed: Path, tmp_path: Path) -> None:
    from flows import data
    from flows.data_watch import data_watch

    deploy(deployed)
    drop = tmp_path / "drop"
    make_source(drop / "good")
    (drop / "bad").mkdir()
    (drop / "bad/records.jsonl").write_text("nonsense\n")
    before = data.version(deployed)
    look = data_watch(str(drop), settled_s=0)
    assert look["imported"] == ["good"] and look["announced"] and list(look["refused"]) == ["bad"]
    assert look["version"] == data.version(deployed) != before
    assert "cannot be used" in (drop / ".refused/bad.reason.txt").read_text()
    assert (drop / ".imported/good/records.jsonl").is_file()
    started = wait_for(lambda: runs("retrain"))
    assert [run.parameters["data_version"] for run in started] == [look["version"]]
    again = data_watch(str(drop), settled_s=0)
    assert not (again["imported"] or again["refused"] or again["announced"])


def test_a_copy_that_goes_on_is_left_alone(project: Path, prefect_server: str, tmp_path: Path) -> None:
    from flows.data_watch import data_watch

    folder = make_source(tmp_path / "drop/slow")
    (tmp_path / "drop/begun").mkdir()
    os.utime(tmp_path / "drop/begun", (0, 0))
    done = threading.Event()

    def copy() -> None:
        while not done.wait(0.05):
            with (folder / "photos/late.png").open("ab") as file:
                file.write(b"x")

    copier = threading.Thread(target=copy)
    copier.start()
    look = data_watch.fn(str(folder.parent), settled_s=0.3)
    done.set()
    copier.join()
    assert look["unfinished"] == ["begun", "slow"] and not look["imported"] and folder.is_dir()


def test_data_stays_as_it_is_while_a_run_goes_on(project: Path, prefect_server: str, tmp_path: Path) -> None:
    from flows import recovery
    from flows.data_watch import data_watch

    folder = make_source(tmp_path / "drop/next")
    with recovery.exclusive(project):
        assert data_watch.fn(str(folder.parent), settled_s=0)["busy"]
    assert folder.is_dir()


def test_a_changed_url_is_imported_if_it_can_be_used(
    project: Path, prefect_server: str, tmp_path: Path
) -> None:
    from flows import data
    from flows.data_watch import data_watch

    source = make_source(tmp_path / "source")
    shutil.rmtree(project / "data")
    (project / "data.dvc").unlink()
    data.dvc(project, "import-url", "--quiet", str(source), "data")
    first = data_watch.fn()["version"]
    assert not data_watch.fn()["updated"]
    records = (source / "records.jsonl").read_text()
    (source / "records.jsonl").write_text(records.replace('"2"', '"3"'))
    second = data_watch.fn()
    assert second["updated"] and second["announced"] and second["version"] != first
    (source / "records.jsonl").write_text("nonsense\n")
    refused = data_watch.fn()
    assert "data.dvc" in refused["refused"] and refused["version"] == second["version"]
    assert '"3"' in (project / "data/records.jsonl").read_text()
    assert not data_watch.fn()["refused"], "once is enough"


def test_a_run_for_another_data_version_refuses(deployed: Path) -> None:
    from flows import data
    from flows.retrain import retrain

    with pytest.raises(data.DataError, match="longview data rollback 0123456789"):
        retrain(data_version="0123456789")
    assert not executed(deployed)
    assert retrain(data_version=str(data.version(deployed)), until="first", seed=7)["ran"] == ["first"]
    assert "seed: 7" in (deployed / "params.yaml").read_text()


def test_runs_are_told_of(deployed: Path, inbox: tuple[str, list[dict[str, Any]]]) -> None:
    from flows import data, notify
    from flows.data_watch import data_watch
    from flows.retrain import retrain
    from flows.stage import StageFailed

    url, received = inbox
    deploy(deployed, notify=url)
    assert deploy(deployed, notify=url)["notifications"] == "unchanged"
    retrain(until="first")
    (finished,) = wait_for(lambda: texts(received))
    assert "1 stages run in" in finished and "first" in finished and "next: `longview status`" in finished
    received.clear()
    end_of_log = (
        "File \"side.py\", line 1, in <module>\nbuiltins.OSError: [Errno 28] No space left on device: 'x'"
    )
    (deployed / "control/side.fail").write_text(end_of_log)
    with pytest.raises(StageFailed):
        retrain(until="side")
    (failed,) = wait_for(lambda: texts(received))
    assert "retrain failed" in failed and "stage 'side': ended with status" in failed
    assert " s: [Errno 28] No space left on device: 'x'\n" in failed, "what it died of"
    assert "what to do: the disk is full" in failed and len(failed) < 700
    received.clear()
    for _ in range(2):
        with pytest.raises(data.DataError):
            data_watch(drop="nowhere")
    retrain(until="dpo@r1")
    (looking, *others) = wait_for(lambda: len(received) > 1 and texts(received))
    assert "the drop folder nowhere does not exist" in looking
    assert len(others) == 1 and "a run finished" in others[0], "it is told of once"
    received.clear()
    notify.awaited("version 4 (r3)", "2026-11-24T03:00:00+00:00", "**version 4 (r3)** passed.\n\n| table |")
    (waits,) = wait_for(lambda: texts(received))
    assert "version 4 (r3) waits for approval\nversion 4 (r3) passed.\nuntil 2026-11-24 03:00 UTC" in waits
    assert deploy(deployed, notify="off")["notifications"] == "removed"


def test_the_summary_says_what_came_out_and_what_to_do(deployed: Path) -> None:
    from flows import notify
    from flows.retrain import Summary

    change = {"mean": 0.035, "low": 0.012, "high": 0.058, "n": 1000}
    decision = {"decision": "promote", "candidate": "r3", "opponent": "champion r2", "reasoning": change}
    comparison = {"systems": {"r3": {"accuracy": {"reasoning": {"mean": 0.715}}}}}
    for path, content in ((notify.DECISION, decision), (notify.COMPARISON, comparison)):
        (deployed / path).parent.mkdir(parents=True)
        (deployed / path).write_text(json.dumps(content))
    ran = ["sample@r3", "score@r3", "dpo@r3", "compare", "promote"]
    done = Summary("77562a9e8aef.dir", ran, ["judge"], [], 3, "run/20261123-1a2b3c4d")
    assert notify.summary(deployed, done, 4321, "champion") == [
        "5 stages run, 1 restored in 1 h 12 min: sample@r3, score@r3, …, promote",
        "data 77562a9e, version run/20261123-1a2b3c4d",
        "accuracy 68.0% → 71.5%, +3.5 points (95%: +1.2 to +5.8, n = 1,000)",
        "r3 is champion now, before it champion r2",
        "next: `longview report`; to undo: `longview model rollback`",
    ]
    *_, waits, then = notify.summary(deployed, done, 4321, "waiting")
    assert waits == "r3 waits for approval: it passed the gate against champion r2" and "approve" in then


def test_stages_of_two_runs_do_not_share_a_device(deployed: Path, tmp_path: Path) -> None:
    from flows import devices

    deploy(deployed)
    order, said = [], []
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".work").mkdir(parents=True)

    def hold() -> None:
        with devices.held("dpo@r1", elsewhere):
            order.append("first")
            time.sleep(1)
            order.append("first done")

    other = threading.Thread(target=hold)
    other.start()
    wait_for(lambda: order)
    with devices.held("compare", deployed):  # neither samples nor trains
        order.append("compare")
    with devices.held("sample@r1", deployed, said.append):
        order.append("second")
    other.join()
    assert order == ["first", "compare", "first done", "second"] and "gpu-0, gpu-1" in said[0]


def test_a_killed_run_does_not_keep_its_device(deployed: Path, prefect_server: str) -> None:
    from flows import devices

    deploy(deployed)
    code = (
        "from pathlib import Path\nfrom flows import devices\n"
        "with devices.held('dpo', Path.cwd()):\n    print('held', flush=True)\n    input()"
    )
    environment = {**flow_environment(deployed), "PREFECT_API_URL": prefect_server}
    killed = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=deployed,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert killed.stdout and killed.stdout.readline() == b"held\n"
    killed.kill()
    killed.communicate()
    said: list[str] = []
    with devices.held("dpo", deployed, said.append):
        assert not said and (deployed / ".work" / devices.NOTE).is_file()
    assert not (deployed / ".work" / devices.NOTE).exists()
    (deployed / ".work" / devices.NOTE).touch()  # as a full disk leaves it
    with devices.held("dpo", deployed, said.append):
        assert not said


@pytest.mark.parametrize(
    ("visible", "seen"), [("", ["gpu-0", "gpu-1"]), ("1", ["gpu-1"]), ("GPU-7c1f", ["gpu-0", "gpu-1"])]
)
def test_a_stage_takes_the_devices_that_it_may_see(visible: str, seen: list[str]) -> None:
    from flows import devices

    assert devices.seen(devices.names(2), {"CUDA_VISIBLE_DEVICES": visible}) == seen


@contextmanager
def worker_of(root: Path, prefect_server: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`longview worker`, and its output; ended with the block."""
    log = root / "control/worker.log"
    with log.open("ab") as output:
        environment = {**flow_environment(root), "PREFECT_API_URL": prefect_server}
        worker = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "worker"],
            cwd=root,
            env={**environment, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        yield worker, log
    finally:
        worker.terminate()
        worker.wait(30)


@contextmanager
def forwarded(port: int, server: str) -> Iterator[None]:
    """What is sent to the port goes to that server."""
    host, _, target = server.removeprefix("http://").removesuffix("/api").partition(":")

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        sink.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                ours, theirs = listener.accept()[0], socket.create_connection((host, int(target)))
                for pair in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield


def test_a_worker_runs_what_is_asked_for(deployed: Path, prefect_server: str) -> None:
    from prefect.deployments import run_deployment

    deploy(deployed)
    with worker_of(deployed, prefect_server) as (_, log):
        done = run_deployment("retrain/retrain", parameters={"until": "first"}, timeout=60, poll_interval=0.5)
        # A run is completed before its process ends. Told to stop in between, Prefect's worker (3.7.7) waits
        # for ever for its own observer of cancelled runs, and only a second signal ends it.
        wait_for(lambda: "exited cleanly" in log.read_text())
    assert done.state and done.state.is_completed(), log.read_text()
    assert executed(deployed) == ["first"]


def test_a_triggered_run_that_newer_data_overtook_has_nothing_to_do(
    deployed: Path, prefect_server: str
) -> None:
    from prefect.events import emit_event

    from flows.data_watch import CHANGED, RESOURCE

    deploy(deployed)
    emit_event(CHANGED, resource=RESOURCE, payload={"md5": "0" * 32 + ".dir"})
    wait_for(lambda: runs("retrain"))
    with worker_of(deployed, prefect_server) as (_, log):
        wait_for(lambda: "exited cleanly" in log.read_text(), timeout_s=60)
    (run,) = runs("retrain")
    assert run.state.name == "Superseded" and run.state.is_completed() and not executed(deployed)
    assert "was overtaken: data.dvc names" in run.state.message


def test_a_run_outlives_its_worker(deployed: Path, prefect_server: str) -> None:
    from prefect.deployments import run_deployment

    from flows import lost_runs

    deploy(deployed)
    (deployed / "control/first.hang").touch()
    with worker_of(deployed, prefect_server) as (worker, _):
        run_deployment("retrain/retrain", parameters={"until": "dpo@r1"}, timeout=0)
        wait_for(lambda: executed(deployed))
        worker.kill()
    assert lost_runs.close(socket.gethostname(), print, set()) == set(), "its process is there"
    (deployed / "control/first.hang").unlink()
    wait_for(lambda: runs("retrain")[0].state.is_final(), timeout_s=60)
    assert runs("retrain")[0].state.is_completed() and executed(deployed) == ["first", "dpo@r1"]
    assert "dpo@r1" in (deployed / ".work/logs/runs/retrain.log").read_text()


def test_a_run_waits_for_a_server_that_restarts_at_its_start(deployed: Path, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client

    deploy(deployed)
    with get_client(sync_client=True) as client:
        asked = client.create_flow_run_from_deployment(read("retrain").id, parameters={"until": "first"})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # nobody answers there yet
    environment = {**flow_environment(deployed), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.engine"],
        cwd=deployed,
        env={**environment, "PREFECT__FLOW_RUN_ID": str(asked.id)},
    )
    time.sleep(5)
    assert run.poll() is None, "it waits"
    with forwarded(port, prefect_server):
        assert run.wait(60) == 0
    assert runs("retrain")[0].state.is_completed()


def test_lost_runs_are_closed_and_hold_nobody_up(deployed: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    from flows import lost_runs

    deploy(deployed)
    said: list[str] = []
    with get_client(sync_client=True) as client:
        lost = client.create_flow_run_from_deployment(read("retrain").id)
        assert client.set_flow_run_state(lost.id, Pending()).state.is_pending(), "as a worker takes it"
        behind = client.create_flow_run_from_deployment(read("retrain").id)
        assert client.set_flow_run_state(behind.id, Pending()).state.name == "AwaitingConcurrencySlot"
        for worker in client.read_workers_for_work_pool("longview"):  # of the tests before
            place = {"work_pool_name": "longview", "name": worker.name}
            client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=place)
        client.send_worker_heartbeat("longview", "elsewhere", heartbeat_interval_seconds=30)
        assert lost_runs.close("host", said.append, set()) == set(), "it may be that one's"
        before = lost_runs.close("elsewhere", said.append, set())
        assert before and not said, "its worker may be about to start it"
        assert lost_runs.close("elsewhere", said.append, before) == before
        assert lost.name in said[0] and client.read_flow_run(lost.id).state.is_crashed()
        assert client.set_flow_run_state(behind.id, Pending()).state.is_pending(), "its place is free"


def test_a_run_that_a_worker_could_not_start_is_due_again(deployed: Path) -> None:
    """As Prefect's worker leaves it if the server goes away just when the run is taken."""
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    from flows import lost_runs

    deploy(deployed)
    prefix = "Failed to submit flow run to infrastructure"
    messages = [
        f"{prefix}: ConnectError: All connection attempts failed",
        f"{prefix}: FileNotFoundError: no such folder",
        lost_runs.LOST,
    ]
    said: list[str] = []
    with get_client(sync_client=True) as client:
        asked = [client.create_flow_run_from_deployment(read("retrain").id) for _ in messages]
        for run, message in zip(asked, messages, strict=True):
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
        lost_runs.close("host", said.append, set())
        states = [client.read_flow_run(run.id).state.type.name for run in asked]
        assert states == ["SCHEDULED", "CRASHED", "CRASHED"]
        assert said == [f"run {asked[0].name}: due again; the server was away when it was to start"]
        lost_runs.close("host", said.append, set())
    assert len(said) == 1


def test_a_run_goes_on_when_prefect_no_longer_reserves_its_place(deployed: Path, prefect_server: str) -> None:
    """As after an outage longer than the reservation: Prefect's own engine would end the run."""
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    deploy(deployed)
    (deployed / "control/first.hang").touch()
    often = "import prefect.concurrency._leases as leases; leases._RENEWAL_FRACTION = 0.01"  # every 3 s
    engine = "import runpy; runpy.run_module('prefect.engine', run_name='__main__')"
    log = deployed / "control/run.log"
    with get_client(sync_client=True) as client, log.open("wb") as output:
        asked = client.create_flow_run_from_deployment(read("retrain").id, parameters={"until": "dpo@r1"})
        client.set_flow_run_state(asked.id, Pending())
        environment = {**flow_environment(deployed), "PREFECT_API_URL": prefect_server}
        run = subprocess.Popen(
            [sys.executable, "-c", f"{often}\n{engine}"],
            cwd=deployed,
            env={**environment, "PREFECT__FLOW_RUN_ID": str(asked.id)},
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(lambda: executed(deployed))
            lease = client.read_flow_run(asked.id).state.state_details.deployment_concurrency_lease_id
            given_back = {"lease_id": str(lease)}
            client.request("POST", "/v2/concurrency_limits/decrement-with-lease", json=given_back)
            wait_for(lambda: "no longer reserves" in log.read_text(), timeout_s=60)
            (deployed / "control/first.hang").unlink()
            assert run.wait(60) == 0, log.read_text()
        finally:
            run.kill()
    assert executed(deployed) == ["first", "dpo@r1"] and runs("retrain")[0].state.is_completed()


@pytest.mark.parametrize(
    ("url", "said"),
    [(None, "longview up, then longview deploy"), ("http://127.0.0.1:9/api", "does not answer")],
)
def test_without_a_server_deploy_says_how_to_get_one(deployed: Path, url: str | None, said: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from typer.testing import CliRunner

    from flows.cli import app

    with temporary_settings({PREFECT_API_URL: url}):
        done = CliRunner().invoke(app, ["deploy"])
    assert done.exit_code == 1 and said in done.output


def test_the_command_says_what_it_did(deployed: Path) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    (deployed / "inbox").mkdir()
    done = CliRunner().invoke(app, ["deploy", "--cron", "0 3 * * *", "--drop", "inbox", "--gpus", "1"])
    assert done.exit_code == 0, done.output
    assert "retrain/retrain" in done.output and "created" in done.output and "longview worker" in done.output
    assert read("data-watch").parameters == {"drop": "inbox"}
    wrong = CliRunner().invoke(app, ["deploy", "--cron", "at night"])
    assert wrong.exit_code == 1 and "at night" in wrong.output
    wrong = CliRunner().invoke(app, ["deploy", "--notify", "phone"])
    assert wrong.exit_code == 1 and "Apprise" in wrong.output
