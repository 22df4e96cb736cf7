"""A stage whose engine is a server: killed and run again, refused, and told apart from its parameters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mock_server import MockServer
from tests.support.fake_boards import contents, make_workspace, stand_in
from tests.support.imports import REPOSITORY

GENERATOR = "artifacts/foundation/generator"
OUT = Path("artifacts/generate")
STAGE = [sys.executable, "-m", "tasks.generate"]


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: MockServer) -> Path:
    engine = {"kind": "openai", "url": server.url, "capacity": 4}
    chain = {"min_steps": 2, "max_steps": 3, "attempts": 1}
    overrides = {
        "engines": {"generator": engine},
        "generate": {"questions": 12, "samples": 2, "chunk": 4, "chain": chain},
    }
    make_workspace(tmp_path, overrides=overrides)
    stand_in(tmp_path, GENERATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def generate() -> subprocess.CompletedProcess[str]:
    return subprocess.run(STAGE, capture_output=True, text=True, check=False)


def test_killed_it_sends_only_what_is_missing_and_ends_with_the_same_bytes(
    workspace: Path, server: MockServer
) -> None:
    assert generate().returncode == 0
    whole, everything = contents(OUT), server.stats()["calls"]
    canary = 8  # calls of it at most, every time
    server.set_rules({"do": "reply", "delay_s": 0.1})
    process = subprocess.Popen(STAGE, stderr=subprocess.DEVNULL)
    while server.stats()["calls"] < everything // 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (OUT / "manifest.json").exists()
    sent = server.stats()["calls"]
    server.set_rules()
    assert generate().returncode == 0
    assert contents(OUT) == whole
    under_way = 4 + 2 * 4  # in flight at the kill, or answered in the last moments before it
    assert server.stats()["calls"] <= everything - sent + canary + under_way


def test_what_is_answered_survives_a_move_of_the_server(workspace: Path, server: MockServer) -> None:
    from tasks.engines import EngineParams

    here = EngineParams("openai", url="http://a/v1", model="m")
    there = EngineParams("openai", url="http://b/v1", model="m", capacity=9, patience_s=1.0)
    assert here.identity == there.identity != EngineParams("openai", url="http://a/v1", model="n").identity
    assert EngineParams(capacity=8).identity != EngineParams(capacity=9).identity


def test_past_the_error_budget_the_stage_fails_and_shows_an_error(
    workspace: Path, server: MockServer
) -> None:
    params = Path("params.yaml")
    few = {"questions: 12": "questions: 24"}
    for old, new in few.items():
        params.write_text(params.read_text().replace(old, new))
    server.set_rules({"do": "status", "status": 400, "when": "json_schema", "body": "context too long"})
    ended = generate()
    assert ended.returncode != 0 and "context too long" in ended.stderr
    assert re.search(r"gave up on a request with a JSON schema: HTTP 400", ended.stderr)  # the canary
    server.set_rules(
        {"do": "reply", "times": 12}, {"do": "status", "status": 400, "body": "context too long"}
    )
    ended = generate()
    assert ended.returncode != 0
    assert re.search(
        r"21 of \d+ requests were given up on, more than the error budget allows \(5%\): 21 \(HTTP 400 21\)."
        r" The last one, \S+: HTTP 400 \(context too long\)",
        ended.stderr,
    ), ended.stderr[-2000:]


def test_a_line_says_how_fast_the_engine_was(workspace: Path, server: MockServer) -> None:
    server.set_rules({"do": "status", "status": 503, "times": 2})
    ended = generate()
    assert ended.returncode == 0, ended.stderr[-2000:]
    line = next(line for line in ended.stderr.splitlines() if "requests in" in line)
    chains = 24
    requests = chains * 4  # three steps and the answer
    assert re.match(
        rf"generator: {requests} requests in \d+ s \([\d.,]+/s\), [\d,]+ output tokens/s, "
        r"\d+% of prompt tokens cached, engine \d+% full, 2 \(HTTP 503 2\) retries, 0 failures",
        line,
    ), line


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "openai"}, "either `launch: true` or the `url`"),
        ({"kind": "openai", "launch": True, "url": "http://a/v1"}, "either `launch: true` or the `url`"),
        ({"kind": "local", "url": "http://a/v1"}, "launch and url are for `kind: openai`, not for local"),
        ({"kind": "vllm", "launch": True}, "launch and url are for `kind: openai`, not for vllm"),
        ({"kind": "fake", "model": "m"}, "model is for `kind: openai` and `kind: vllm`, not for fake"),
        ({"kind": "vllm-server"}, "expected one of"),
        ({"capacity": 0}, "capacity: expected 1 or more"),
        ({"error_budget": 5}, "error_budget: expected"),
        ({"prices": {"input": 3.0}}, "unknown key 'input'"),
    ],
)
def test_an_engine_that_cannot_be_is_named(engine: dict[str, Any], message: str) -> None:
    from tasks.engines import EngineParams
    from tasks.params import ParamsError, parse

    with pytest.raises(ParamsError, match=message) as error:
        parse(engine, EngineParams, "params.yaml: engines.generator")
    assert str(error.value).startswith("params.yaml: engines.generator")
    assert json.dumps(engine)
