"""A stage whose engine is a server, or vLLM in a process of its own: killed and run again, refused, and told
apart from its parameters."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mock_server import MockServer
from tasks.served import SERVERS, stop_lingering
from tasks.stage import StageRun
from tests.support import stand_in_vllm
from tests.support.fake_boards import contents, make_workspace, stand_in
from tests.support.imports import REPOSITORY

GENERATOR = "artifacts/foundation/generator"
OUT = Path("artifacts/generate")
STAGE = [sys.executable, "-m", "tasks.generate"]
SERVER = stand_in_vllm.__file__


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: MockServer) -> Path:
    set_up(tmp_path, monkeypatch, {"kind": "openai", "url": server.url, "capacity": 4})
    return tmp_path


def set_up(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]) -> None:
    """A workspace with this generator."""
    chain = {"min_steps": 2, "max_steps": 3, "attempts": 1}
    overrides = {
        "engines": {"generator": engine},
        "generate": {"questions": 12, "samples": 2, "chunk": 4, "chain": chain},
    }
    make_workspace(folder, overrides=overrides)
    stand_in(folder, GENERATOR)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def generate() -> subprocess.CompletedProcess[str]:
    return subprocess.run(STAGE, capture_output=True, text=True, check=False, timeout=120)


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


def test_where_every_reply_is_kept_no_server_is_needed(workspace: Path, server: MockServer) -> None:
    code = """
        import os, time
        from tasks import generate, outcomes

        def killed(*_):
            time.sleep(0.2)  # the last replies are durable by then
            os._exit(9)

        outcomes.Outcomes.__exit__ = killed
        generate.main()
        """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == 9
    server.stop()
    ended = generate()
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "generator: not asked: every reply was kept" in ended.stderr


def test_what_is_answered_survives_a_move_of_the_server(workspace: Path, server: MockServer) -> None:
    from tasks.engines import EngineParams

    here = EngineParams("openai", url="http://a/v1", model="m")
    there = EngineParams("openai", url="http://b/v1", model="m", capacity=9, patience_s=1.0)
    ours = EngineParams("openai", launch=True, model="m", linger_s=60, probe_tolerance=0.5)
    assert (
        ours.identity
        == here.identity
        == there.identity
        != EngineParams("openai", url="http://a/v1", model="n").identity
    )
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


VLLM = """#!{python}
# In place of the interpreter that has vLLM (the first argument is our worker), without a model.
import os, sys, threading, time
import orjson
from benchmarks.mock_server import smallest, user_text

def answer(line):
    time.sleep(float(os.environ["DELAY_S"]))
    schema, asked = line["schema"], line["messages"][-1]
    text = orjson.dumps(smallest(schema)).decode() if schema else user_text(asked)
    reply = {{"id": line["id"], "text": text, "finished": True, "tokens": 9, "cached_tokens": 32}}
    os.write(1, orjson.dumps(reply | {{"prompt_tokens": 40 + 64 * len(line["images"])}}) + b"\\n")

print("arguments", *sys.argv[2:], file=sys.stderr, flush=True)
calls = open("calls", "a", buffering=1)
os.write(1, b'{{"ready":"0.0"}}\\n')
for line in map(orjson.loads, sys.stdin.buffer):
    if "id" in line:
        print(line["id"], file=calls)
        threading.Thread(target=answer, args=[line], daemon=True).start()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose generator is vLLM in a process of its own."""
    python = tmp_path / "python"
    python.write_text(VLLM.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON_WITH_VLLM", str(python))
    monkeypatch.setenv("DELAY_S", "0.0")
    options = {"arguments": ["--max-model-len", "512"], "environment": {"DELAY_S": "$DELAY_S"}}
    set_up(tmp_path, monkeypatch, {"kind": "vllm", "python": "$PYTHON_WITH_VLLM", "capacity": 4, **options})
    return tmp_path


def asked() -> int:
    """How often vLLM was, so far."""
    return len(Path("calls").read_text().split()) if Path("calls").exists() else 0


def test_vllm_in_a_process_of_its_own_is_a_parameter_away(own: Path) -> None:
    ended = generate()
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert re.search(r"generator: 96 requests in .*% of prompt tokens cached.* 0 failures", ended.stderr)
    log = (own / ".work/logs/vllm-generator.log").read_text()
    assert re.match(rf"arguments --model \S*{GENERATOR} --max-model-len 512\n", log)


def test_killed_with_vllm_it_asks_only_what_is_missing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate().returncode == 0
    whole, everything = contents(OUT), asked()
    monkeypatch.setenv("DELAY_S", "0.1")
    process = subprocess.Popen(STAGE, stderr=subprocess.DEVNULL)
    while asked() < everything + everything // 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (OUT / "manifest.json").exists()
    sent = asked() - everything
    monkeypatch.setenv("DELAY_S", "0.0")
    assert generate().returncode == 0
    assert contents(OUT) == whole
    canary, under_way = 8, 4 + 2 * 4
    assert asked() - everything - sent <= everything - sent + canary + under_way


class Recorded(StageRun):
    """A stage that keeps what it tells MLflow."""

    def __init__(self, folder: Path) -> None:
        super().__init__("sample", folder / "out", folder / "scratch", None)
        self.logged: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logged |= metrics


def test_reloads_and_restarts_of_a_server_that_lingers_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from models.engines.base import Sampling
    from models.engines.base import generate as generate_from
    from models.vlm import Conversation
    from tasks.engines import open_engine

    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {SERVER} "$@"\n')
    python.chmod(0o755)
    options = {"launch": True, "python": str(python), "linger_s": 60, "environment": {"CALLS": "calls"}}
    set_up(tmp_path, monkeypatch, {"kind": "openai", **options})
    counted = []
    try:
        for round, weights in enumerate((-1.0, -2.0, -2.0)):
            folder, stage = stand_in_vllm.checkpoint(tmp_path / f"r{round}", weights), Recorded(tmp_path)
            if round == 2:
                (folder / "probe.json").unlink()
            with open_engine("generator", folder, [], stage) as engine:
                generate_from(engine, [Conversation([], [(f"Round {round}?", "")])], Sampling())
            counted.append([stage.logged[f"engine/generator/{name}"] for name in ("reloads", "restarts")])
    finally:
        stop_lingering(SERVERS)
    assert counted == [[0, 0], [1, 0], [0, 1]]
    said = capfd.readouterr()
    assert "r2 has no probe of its training" in said.err and "weights reloaded" in said.out


def test_an_engine_that_cannot_say_whose_weights_it_serves_is_not_used(own: Path) -> None:
    stand_in_vllm.write_probe(Path(GENERATOR), -1.0)
    ended = generate()
    assert ended.returncode != 0 and "says no log-probs of the prompt" in ended.stderr


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
        ({"kind": "openai", "url": "http://a/v1", "linger_s": 60}, "linger_s: .*`launch: true`"),
        ({"kind": "openai", "launch": True, "linger_s": -1}, "linger_s: "),
        ({"kind": "vllm", "probe_tolerance": 0}, "probe_tolerance: expected a number above 0"),
    ],
)
def test_an_engine_that_cannot_be_is_named(engine: dict[str, Any], message: str) -> None:
    from tasks.engines import EngineParams
    from tasks.params import ParamsError, parse

    with pytest.raises(ParamsError, match=message) as error:
        parse(engine, EngineParams, "params.yaml: engines.generator")
    assert str(error.value).startswith("params.yaml: engines.generator")
    assert json.dumps(engine)


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: MockServer) -> Path:
    """A workspace whose generator and path judge are on the server, which often knows the answer."""
    from models.prompts import prompt
    from tasks import roles

    set_up(tmp_path, monkeypatch, {"kind": "openai", "url": server.url, "capacity": 4})
    params = Path("params.yaml")
    local = "path_judge:\n    kind: local\n    model:\n    capacity: 128"
    assert local in params.read_text()
    served = f"path_judge:\n    kind: openai\n    model: judge\n    url: {server.url}\n    capacity: 4"
    params.write_text(params.read_text().replace(local, served))
    params.write_text(params.read_text().replace("agreement_questions: 20", "agreement_questions: 0"))
    (tmp_path / "artifacts/judge").mkdir()
    (tmp_path / "artifacts/judge/judge.json").write_text('{"kind": "model"}')
    answers = [question.answer for question in roles.training_questions("generate", 12)]
    often = max(answers, key=answers.count)
    server.set_rules({"do": "reply", "body": often, "when": prompt("short", "answer")})
    return tmp_path


def test_judging_ahead_leaves_nothing_to_ask_and_changes_nothing(judged: Path, server: MockServer) -> None:
    def calls_of(stage: str) -> int:
        before = server.stats()["calls"]
        ended = subprocess.run([sys.executable, "-m", f"tasks.{stage}"], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        return server.stats()["calls"] - before

    sampled, asked = calls_of("generate"), calls_of("assess")
    plain = contents(Path("artifacts/assess"))
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("model: judge\n", "model: judge\n    ahead: true\n"))
    shutil.rmtree(".work")
    sampled_and_judged, left = calls_of("generate"), calls_of("assess")
    assert contents(Path("artifacts/assess")) == plain
    assert left == 0 and sampled_and_judged - sampled == asked
