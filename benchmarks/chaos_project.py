"""The small project that benchmarks/chaos.py runs and kills: its stages, its servers, its worker.

    with project(folder) as services: ...          # {"prefect": …, "mlflow": …, "worker": …}

Its stages take a second: they are tasks/stage.py's open_stage with real records in MLflow, two rounds and a
decision. There is a git repository, a DVC remote, and what `longview deploy` registers.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.results import ROOT
from flows.commands.servers import MLFLOW, PREFECT, command
from flows.environment import SETTINGS

FOREIGN = ("LONGVIEW_", "PREFECT_", "MLFLOW_", "DVC_")
"""Settings of this checkout, not of the project."""
SERVER_S = 120
"""Seconds for a server to answer."""
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


def flow_process(folder: Path) -> psutil.Process | None:
    """The process that holds the checkout, as its lock names it."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((folder / ".work/run.lock").read_text()))
        if process.environ().get("LONGVIEW_ROOT") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
