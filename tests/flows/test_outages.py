"""Servers that die while a run goes on and come back: the run waits for them, and does nothing twice.

The project and its checks are those of `python -m benchmarks.chaos`, which kills at random.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import chaos

pytestmark = pytest.mark.flows


def wait_for(what: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "timed out waiting"
        time.sleep(0.05)


def test_a_run_outlives_both_servers(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    with chaos.project(folder) as services:
        log = folder / "control/longview.log"
        with log.open("wb") as output:
            flow = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "run"],
                cwd=folder,
                env=chaos.environment(folder, list(services.values())),
                stdout=output,
                stderr=output,
            )
        ended = folder / "control/ended.txt"
        for name, stage in (("mlflow", "summary_sft"), ("prefect", "dpo@r1")):
            wait_for(lambda stage=stage: f"Running stage '{stage}'" in log.read_text())
            assert services[name].kill() and flow.poll() is None
            time.sleep(2)
            services[name].start()
        assert flow.wait(180) == 0, log.read_text()
        found = chaos.Found(runs=1)
        chaos.look(folder, services, found)
        assert not any(found.trouble.values()), found.trouble
        assert len(ended.read_text().splitlines()) == 4
