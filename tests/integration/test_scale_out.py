"""Sampling in two actors on a Ray cluster of the stage's own from a server without a model: if an actor or
the stage is killed midway, nothing is lost, and the bytes are those of a run without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import resume
from benchmarks.resume import CAPACITY, Calls, Recorder

QUESTIONS = 50
TWO_ACTORS = {"ray": {"actors": 2}}
Start = Callable[[Mapping[str, Any] | None], subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """What a run without Ray publishes, and how many steps it takes."""
    folder = tmp_path_factory.mktemp("without_ray") / "workspace"
    run = resume.run(folder, QUESTIONS, seed=0)
    return run.outputs, len(run.calls.asked)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "workspace"


@pytest.fixture
def recorder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The server of a prepared workspace."""
    monkeypatch.setattr(resume, "DELAY_S", (0.03, 0.09))
    recorder = Recorder(seed=0)
    with resume.served(recorder) as url:
        resume.prepare(folder, QUESTIONS, url)
        yield recorder


@pytest.fixture
def start(folder: Path, recorder: Recorder) -> Iterator[Start]:
    """start(scale): the stage with that `scale`."""
    started: list[subprocess.Popen[bytes]] = []

    def call(scale: Mapping[str, Any] | None) -> subprocess.Popen[bytes]:
        params = json.loads((folder / "params.yaml").read_text())
        params["engines"]["generator"]["scale"] = scale
        (folder / "params.yaml").write_text(json.dumps(params))
        started.append(resume.start(folder, len(recorder.calls.kills)))
        return started[-1]

    yield call
    for stage in started:
        stage.kill()
        stage.wait()


def await_steps(calls: Calls, count: int, stage: subprocess.Popen[bytes], folder: Path) -> None:
    while len(calls.answered) < count:
        assert stage.poll() is None, (folder / "stage.log").read_text()
        time.sleep(0.005)


def actors_of(stage: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(stage.pid).children(recursive=True)
    return [child for child in children if "SamplingActor" in " ".join(child.cmdline())]


def test_an_actor_killed_midway_loses_nothing(
    folder: Path, recorder: Recorder, start: Start, whole: tuple[dict[str, str], int]
) -> None:
    outputs, steps = whole
    stage, calls = start(TWO_ACTORS), recorder.calls
    await_steps(calls, 1, stage, folder)
    actors = actors_of(stage)
    assert len(actors) == 2
    await_steps(calls, steps // 3, stage, folder)
    actors[0].kill()
    assert len(calls.answered) < steps
    calls.kills.append(time.monotonic())
    resume.finish(stage, folder)
    log = (folder / "stage.log").read_text()
    assert resume.digests(folder) == outputs
    assert len(calls.asked) == steps, log
    assert calls.redone <= 2 * CAPACITY
    print(f"redone: {calls.redone} of {steps}, {calls.lost} of them answered")
    assert f"{4 * QUESTIONS} chains" in log and "generator: " in log and "Traceback" not in log


def test_the_stage_killed_midway_leaves_no_process_and_asks_only_for_the_rest(
    folder: Path, recorder: Recorder, start: Start, whole: tuple[dict[str, str], int]
) -> None:
    outputs, steps = whole
    stage, calls = start(TWO_ACTORS), recorder.calls
    await_steps(calls, 1, stage, folder)
    left = psutil.Process(stage.pid).children(recursive=True)
    (temporary,) = {word for process in left for word in process.cmdline() if word.startswith("--temp-dir=")}
    assert_loopback_only(left)
    await_steps(calls, steps // 2, stage, folder)
    os.kill(stage.pid, signal.SIGKILL)
    assert len(calls.answered) < steps
    calls.kills.append(time.monotonic())
    stage.wait()
    resume.finish(start(None), folder)
    assert resume.digests(folder) == outputs
    assert len(calls.asked) == steps and calls.redone <= 8 * CAPACITY
    print(f"redone: {calls.redone} of {steps}, {calls.lost} of them answered")
    assert not psutil.wait_procs(left, timeout=15)[1]
    assert not Path(temporary.removeprefix("--temp-dir=")).exists()


def assert_loopback_only(processes: list[psutil.Process]) -> None:
    ips = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        if process.is_running()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert ips == {"127.0.0.1"}
