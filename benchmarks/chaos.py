"""Scheduled runs and `kill -9` at random moments: does each end, is nothing trained twice, nothing half done?

    python -m benchmarks.chaos [--kills 50] [--seed 0] [--save]

A small project (benchmarks/chaos_project.py): stages that take a second, with real records in MLflow, two
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import results
from benchmarks.chaos_project import SERVER_S, Service, asked, environment, flow_process, project
from benchmarks.results import ROOT, Row, Table
from flows import interruption, lost_runs, pipeline, retrain

VICTIMS = ("flow", "stage", "dvc", "worker", "prefect", "mlflow")
PAUSE_S, AGAIN_S, AWAY_S = (0.5, 10.0), (0.1, 0.7), (0.5, 5.0)
"""Between two kills, two tries for one that was not there, and before a server or the worker comes back."""
STARTS, RUN_S = 40, 900
"""The most starts of one run, and the longest one may take, in seconds."""
WELL, BADLY = {"COMPLETED"}, {"FAILED", "CRASHED", "CANCELLED"}
ERRORS = (*retrain.EXPECTED, interruption.Interrupted)
CLEARLY = (lost_runs.LOST, *(error.__name__ for error in ERRORS))
"""Parts of Prefect's message that say what is wrong and what to do: of a failed run, the error's name."""


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
