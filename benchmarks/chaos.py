"""Scheduled runs and `kill -9` at random moments: does each end, is nothing trained twice, nothing half done?

    python -m benchmarks.chaos [--kills 50] [--seed 0] [--save]

A small project: stages that take a second (tasks/stage.py's open_stage, with real records in MLflow), two
rounds, a decision, a git repository, a DVC remote; a Prefect server, an MLflow server and a worker of its
own, and what `longview deploy` registers. For each run there is new data, and a flow run that is due at once,
as a schedule makes it; the worker takes it. While it goes on, one process after the other is killed, drawn at
random: flow, stage, the process that DVC is in, worker, Prefect server, MLflow server. The last three come
back after a few seconds, as under systemd; after a run that ended badly the next one is due. After each run
that ends well everything is looked at: Prefect's states, the stages that came to their end, the registry,
`dvc status`.

Stages note their end themselves, after they have published. One that ends twice on the same inputs was done
twice. Killed before its end, a stage is begun again: in a real one, checkpoint and journal continue it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import results
from benchmarks.results import ROOT, Row, Table
from flows import interruption, lost_runs, pipeline, retrain
from flows.commands.servers import MLFLOW, PREFECT, command
from flows.environment import SETTINGS

FOREIGN = ("LONGVIEW_", "PREFECT_", "MLFLOW_", "DVC_")
"""Settings of this checkout, not of the project."""
VICTIMS = ("flow", "stage", "dvc", "worker", "prefect", "mlflow")
PAUSE_S, AGAIN_S, AWAY_S = (0.5, 10.0), (0.1, 0.7), (0.5, 5.0)
"""Between two kills, two tries for one that was not there, and before a server or the worker comes back."""
STARTS, RUN_S, SERVER_S = 40, 900, 120
"""The most starts of one run, the longest one may take, and a server to answer."""
WELL, BADLY = {"COMPLETED"}, {"FAILED", "CRASHED", "CANCELLED"}
ERRORS = (*retrain.EXPECTED, interruption.Interrupted)
CLEARLY = (lost_runs.LOST, *(error.__name__ for error in ERRORS))
"""Parts of Prefect's message that say what is wrong and what to do: of a failed run, the error's name."""
STAGE = """
import hashlib, json, os, sys, time
from pathlib import Path

from tasks.stage import open_stage

name, out, *inputs = sys.argv[1:]
key = os.environ.get("LONGVIEW_STAGE_KEY", "")
with open_stage(name, params={}, inputs=inputs, out=out) as stage:
    time.sleep(1)
    files = [file for folder in inputs for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    content = hashlib.md5(b"".join(file.read_bytes() for file in files)).hexdigest()
    (stage.out / "weights").write_text(f"{name} {content}")
    stage.metrics({"length": 2.5})
with open("control/ended.txt", "a") as file:
    file.write(f"{name} {key}\\n")
"""
DECIDE = """
import hashlib, json
from pathlib import Path

from tasks.registry import Registry

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

def md5(path):
    return hashlib.md5(Path(path, "weights").read_bytes()).hexdigest()

champion, name = Registry().champion(), "r2"
agents = {"reasoning": md5("artifacts/rounds/r2/dpo"), "summary": md5("artifacts/summary_sft")}
if champion and champion.agents.reasoning == agents["reasoning"]:  # it was promoted: the same decision again
    champion = Registry().version(champion.over) if champion.over != "base" else None
over = {"reasoning": champion.agents.reasoning, "summary": champion.agents.summary} if champion else None
gain = {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 400}
share = {"mean": 0.6, "low": 0.55, "high": 0.65, "n": 400}
decision = {"decision": "promote", "candidate": name, "candidate_agents": agents,
            "opponent": "champion" if over else "base", "opponent_agents": over, "reasoning": gain,
            "perception": gain, "reason": "r2 gains"}
write("artifacts/promote/decision.json", json.dumps(decision))
systems = {name: {"accuracy": dict.fromkeys(("reasoning", "perception", "validation"), share)}}
comparison = {"order": [name], "systems": systems, "rounds": {}}
write("artifacts/compare/comparison.json", json.dumps(comparison))
answer = {"id": "1", "split": "test", "set": "reasoning", "question": "?", "truth": "1", "answer": "1"}
write(f"artifacts/evaluate/{name}/predictions.jsonl", json.dumps({**answer, "right": True}) + "\\n")
inputs = {"artifacts/rounds/r2/dpo/checkpoint": agents["reasoning"],
          "artifacts/summary_sft/checkpoint": agents["summary"]}
write(f"artifacts/evaluate/{name}/manifest.json", json.dumps({"inputs": inputs}))
"""
DVC_YAML = """
stages:
  reasoning_sft:
    cmd: python stage.py reasoning_sft artifacts/reasoning_sft data
    deps: [data, stage.py]
    outs: [artifacts/reasoning_sft]
  summary_sft:
    cmd: python stage.py summary_sft artifacts/summary_sft artifacts/reasoning_sft
    deps: [artifacts/reasoning_sft, stage.py]
    outs: [artifacts/summary_sft]
  dpo:
    foreach: ${rounds}
    do:
      cmd: python stage.py dpo@${key} artifacts/rounds/${key}/dpo ${item.policy}
      deps: ["${item.policy}", stage.py]
      outs: ["artifacts/rounds/${key}/dpo"]
  promote:
    cmd: python decide.py
    deps: [artifacts/rounds/r2/dpo, artifacts/summary_sft, decide.py]
    outs: [artifacts/promote, artifacts/compare, artifacts/evaluate]
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Service:
    """A server on a port of its own, or the worker; started again after a kill."""

    name: str
    folder: Path
    words: list[str]
    url: str = ""
    health: str = ""
    others: list[Service] = field(default_factory=list)
    """Servers that it uses."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / f"control/{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.words,
                cwd=self.folder,
                env=environment(self.folder, self.others),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def await_answer(self) -> None:
        deadline = time.monotonic() + SERVER_S
        while self.url and not asked(f"{self.url}{self.health}"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not come up: {self.folder}/control has its log")
            time.sleep(0.2)

    def kill(self) -> bool:
        """SIGKILL to it and, of a server, to its processes; a run outlives its worker."""
        if self.process is None or self.process.poll() is not None:
            return False
        whole = [psutil.Process(self.process.pid)]
        whole += whole[0].children(recursive=True) if self.url else []
        for process in whole:
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        return True


def services_of(folder: Path) -> dict[str, Service]:
    """The two servers, and the worker, which needs them."""
    found = {}
    for server in (PREFECT, MLFLOW):
        port = free_port()
        words, url = command(server, port, folder), f"http://127.0.0.1:{port}"
        found[server.name] = Service(server.name, folder, words, url, server.health)
    words = [sys.executable, "-m", "flows.cli", "worker"]
    return {**found, "worker": Service("worker", folder, words, others=list(found.values()))}


def asked(url: str, **body: Any) -> Any:
    """What Prefect or MLflow answers, None while it does not."""
    with suppress(httpx.HTTPError, ValueError):
        answer = httpx.post(url, json=body, timeout=10) if body else httpx.get(url, timeout=10)
        if answer.is_success:
            return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
    return None


def environment(folder: Path, services: Sequence[Service] = ()) -> dict[str, str]:
    """This checkout's code on that project and those servers, set as `longview up` sets them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    urls = {service.name: service.url for service in services}
    servers = (
        {"PREFECT_API_URL": f"{urls['prefect']}/api", "MLFLOW_TRACKING_URI": urls["mlflow"]} if urls else {}
    )
    return {
        **kept,
        **SETTINGS,
        **servers,
        "PYTHONPATH": str(ROOT),
        "LONGVIEW_ROOT": str(folder),
        "PREFECT_HOME": str(folder / ".work/prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_DEPLOYMENT_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def make(folder: Path) -> None:
    """The project, with nothing run."""
    from flows import profile

    for name in ("control", "profiles", "data", ".work"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "prefect.yaml", folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    (folder / "stage.py").write_text(STAGE)
    (folder / "decide.py").write_text(DECIDE)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "profiles/embedded.yaml").write_text("profile: embedded\nseed: 0\nrounds: 2\npromote: {}\n")
    (folder / ".gitignore").write_text("/data\n/artifacts\n/.work\n/control\n")
    (folder / "data/records.jsonl").write_text('{"id": "0"}\n')
    profile.activate(folder, "embedded")
    run = environment(folder)
    for words in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        [sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "local", str(folder / ".work/remote")],
        [sys.executable, "-m", "dvc", "add", "-q", "data"],
        ["git", "config", "user.name", "chaos"],
        ["git", "config", "user.email", "chaos@example.org"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "project"],
    ):
        subprocess.run(words, cwd=folder, env=run, check=True)


@contextmanager
def project(folder: Path) -> Iterator[dict[str, Service]]:
    """The project, its servers, its deployments and its worker; nothing of them is left behind."""
    make(folder)
    services = services_of(folder)
    try:
        for service in services.values():
            service.start()
            service.await_answer()
            if service.name == MLFLOW.name:  # both are there; data-watch stays out of the way
                words = [sys.executable, "-m", "flows.cli", "deploy", "--gpus", "1", "--watch", "86400"]
                run = environment(folder, list(services.values())[:2])
                subprocess.run(words, cwd=folder, env=run, check=True)
        yield services
    finally:
        flow = flow_process(folder)
        for service in services.values():
            service.kill()
        if flow:
            flow.kill()


@dataclass
class Found:
    """What was seen. trouble: what must not be, in words."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    failed_clearly: int = 0
    trouble: dict[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in ("end", "twice", "half", "states", "dvc")}
    )


def rampage(folder: Path, services: Mapping[str, Service], kills: int, seed: int) -> Found:
    """Runs on ever new data, until so many processes were killed; then one without a kill."""
    found, draw = Found(), random.Random(seed)
    while True:
        found.runs += 1
        new_data(folder, found.runs)
        last = sum(found.kills.values()) >= kills
        one_run(folder, services, found, draw, 0 if last else kills)
        look(folder, services, found)
        print(f"run {found.runs}: {sum(found.kills.values())} kills, {found.starts} starts", flush=True)
        for text in (line for lines in found.trouble.values() for line in lines):
            print(f"trouble so far: {text}", flush=True)
        if last:
            return found


def new_data(folder: Path, number: int) -> None:
    """Another version of data/, tracked."""
    with (folder / "data/records.jsonl").open("a") as file:
        file.write(f'{{"id": "{number}"}}\n')
    words = [sys.executable, "-m", "dvc", "add", "-q", "data"]
    subprocess.run(words, cwd=folder, env=environment(folder), check=True)


def one_run(
    folder: Path, services: Mapping[str, Service], found: Found, draw: random.Random, kills: int
) -> None:
    """Runs that are due, until one ends well, killing meanwhile."""
    back: dict[str, float] = {}
    for _ in range(STARTS):
        found.starts += 1
        flow_run = due(services, found.starts)
        killed = harass(folder, services, found, draw, kills, back, flow_run)
        return_services(services, back, at_once=True)
        state = state_of(services, flow_run)
        if state.get("type") in WELL:
            return
        if killed:
            continue
        if any(name in (state["message"] or "") for name in CLEARLY):
            found.failed_clearly += 1
        else:
            found.trouble["end"].append(f"start {found.starts}: {state['type']}: {state['message']}")
    found.trouble["end"].append(f"run {found.runs} did not end well in {STARTS} starts")


def due(services: Mapping[str, Service], start: int) -> str:
    """A run of the deployment, due now; its id. A server that has just come back may fail at first."""
    api, deadline = f"{services['prefect'].url}/api", time.monotonic() + SERVER_S
    while time.monotonic() < deadline:
        if deployment := asked(f"{api}/deployments/name/retrain/retrain"):
            url = f"{api}/deployments/{deployment['id']}/create_flow_run"
            if made := asked(url, state={"type": "SCHEDULED"}, idempotency_key=f"start {start}"):
                return str(made["id"])
        time.sleep(0.5)
    raise RuntimeError("Prefect's server does not take a run: control/prefect.log")


def state_of(services: Mapping[str, Service], flow_run: str) -> dict[str, Any]:
    """Prefect's state of a run; empty while the server is away."""
    return (asked(f"{services['prefect'].url}/api/flow_runs/{flow_run}") or {}).get("state") or {}


def harass(
    folder: Path,
    services: Mapping[str, Service],
    found: Found,
    draw: random.Random,
    kills: int,
    back: dict[str, float],
    flow_run: str,
) -> bool:
    """Kill at random while the run goes on; whether its flow was among the victims."""
    began = time.monotonic()
    next_kill, next_look, state = began + draw.uniform(*PAUSE_S), began, ""
    victim = draw.choice(VICTIMS)
    while True:
        return_services(services, back)
        now = time.monotonic()
        if now > next_look:
            found_now = state_of(services, flow_run)
            state = found_now.get("type") or state
            if state in WELL | BADLY and not lost_runs.NOT_STARTED.match(found_now.get("message") or ""):
                return False
            next_look = now + 0.5
        if now > began + RUN_S:
            found.trouble["end"].append(f"start {found.starts}: still going after {RUN_S} s")
            return True
        flow = flow_process(folder)
        taken = flow or state == "PENDING"
        if taken and sum(found.kills.values()) < kills and now > next_kill:
            if kill(victim, flow, services):
                found.kills[victim] += 1
                if victim == "flow":
                    return True
                if victim in services:
                    back[victim] = time.monotonic() + draw.uniform(*AWAY_S)
                victim, next_kill = draw.choice(VICTIMS), time.monotonic() + draw.uniform(*PAUSE_S)
            else:  # a stage lives for a second: tried again until there is one
                next_kill = time.monotonic() + draw.uniform(*AGAIN_S)
        time.sleep(0.05)


def flow_process(folder: Path) -> psutil.Process | None:
    """The process that holds the checkout, as its lock names it."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((folder / ".work/run.lock").read_text()))
        if process.environ().get("LONGVIEW_ROOT") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def kill(name: str, flow: psutil.Process | None, services: Mapping[str, Service]) -> bool:
    """Whether there was such a process."""
    if name in services:
        return services[name].kill()
    if flow is None:
        return False
    with suppress(psutil.Error):
        if name == "flow":
            flow.kill()
            return True
        marks = {"stage": "stage.py", "dvc": "flows.dvc_server"}
        for process in flow.children(recursive=True):
            with suppress(psutil.Error):
                if marks[name] in process.cmdline()[1:3]:
                    process.kill()
                    return True
    return False


def return_services(services: Mapping[str, Service], back: dict[str, float], at_once: bool = False) -> None:
    """Start those again whose time has come, or that ended; `at_once` all, and wait for them."""
    for name, service in services.items():
        if name not in back and service.process and service.process.poll() is not None:
            back[name] = time.monotonic() + AWAY_S[0]
    for name, when in list(back.items()):
        if at_once or time.monotonic() > when:
            services[name].start()
            del back[name]
    if at_once:
        for service in services.values():
            service.await_answer()


def look(folder: Path, services: Mapping[str, Service], found: Found) -> None:
    """What must hold after a run that ended well."""
    ended = (folder / "control/ended.txt").read_text().split("\n")[:-1]
    found.trouble["twice"] = [f"{line}: {count} times" for line, count in Counter(ended).items() if count > 1]
    run = f"run {found.runs}"
    found.trouble["half"] += [f"{run}: {what}" for what in registry_trouble(folder, services["mlflow"].url)]
    found.trouble["states"] = state_trouble(services["prefect"].url)
    states = {**pipeline.data_states(folder), **pipeline.states(folder)}
    found.trouble["dvc"] += [
        f"{run}: {name} {s.state}" for name, s in states.items() if s.state != pipeline.UP_TO_DATE
    ]


def registry_trouble(folder: Path, url: str) -> list[str]:
    """The champion is the candidate of the last decision, with all that a promotion leaves."""
    from tasks.registry import Agents, Registry

    os.environ["MLFLOW_TRACKING_URI"] = url
    registry = Registry()
    champion, history = registry.champion(), registry.history()
    decision = json.loads((folder / "artifacts/promote/decision.json").read_text())
    if champion is None or champion.agents != Agents(**decision["candidate_agents"]):
        return [f"the champion is {champion and champion.number}, not the candidate of the last decision"]
    missing = [tag for tag in ("run", "commit", "promoted_over", "who", "reason") if tag not in champion.tags]
    wrong = [f"version {champion.number} lacks the tag {tag}" for tag in missing]
    if [change.after for change in history][-1] != champion.number or champion.awaiting:
        wrong.append(f"the history does not end with version {champion.number}")
    if len({change.after for change in history}) != len(history):
        wrong.append("a version became champion twice")
    return wrong


def state_trouble(url: str) -> list[str]:
    """Flow runs that Prefect believes to be going on, though nothing does."""
    found = asked(f"{url}/api/flow_runs/filter", limit=200)
    going = {"PENDING", "RUNNING", "CANCELLING", "PAUSED"}
    return [f"{run['name']}: {run['state_name']}" for run in found if run["state_type"] in going]


def judge(found: Found) -> tuple[list[Row], Table]:
    """Rows, and the table of victims."""

    def none(what: str, key: str) -> Row:
        count = len(found.trouble[key])
        return Row(what, count, "", "0", count == 0)

    kills = sum(found.kills.values())
    rows = [
        Row("processes killed", kills, ""),
        Row(f"runs, in {found.starts} starts", found.runs, ""),
        Row("starts that failed, saying what is wrong and what to do", found.failed_clearly, ""),
        none("runs that did not end, or ended without saying why", "end"),
        none("stages that came to their end twice on the same inputs", "twice"),
        none("half-promoted models", "half"),
        none("runs that Prefect shows as going on, in the end", "states"),
        none("stages and data not up to date after a run (dvc status)", "dvc"),
    ]
    cells = [[name, str(found.kills[name])] for name in VICTIMS]
    return rows, Table("Victims", ("Process", "Kills"), cells, "SIGKILL, at random moments.")


def arguments(words: Sequence[str] | None = None) -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if args.kills < 1:
        parser.error("--kills: 1 or more")
    return args


def main() -> int:
    """Run, kill, look."""
    args = arguments()
    (ROOT / ".work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".work", prefix="chaos-") as home:
        folder = Path(home) / "project"
        with project(folder) as services:
            found = rampage(folder, services, args.kills, args.seed)
            if any(found.trouble.values()):
                shutil.copytree(folder / "control", ROOT / ".work/chaos", dirs_exist_ok=True)
                print("what worker, runs and servers wrote: .work/chaos/", file=sys.stderr)
        rows, table = judge(found)
    return results.finish("chaos", rows, [results.row_table("chaos", rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
