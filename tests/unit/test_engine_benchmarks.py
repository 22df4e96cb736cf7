"""Benchmarks of the engines: what they count and judge, and a run of each that takes a moment.

pytest tests/unit/test_engine_benchmarks.py
"""

from __future__ import annotations

import itertools
import json
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    chains_memory,
    client_overhead,
    environments,
    generation,
    local_engine,
    resume,
    traces,
)
from benchmarks.client_overhead import BARE, CHAINS, OURS, PEERS, Load
from benchmarks.environments import PeerError
from benchmarks.mock_server import MockServer
from benchmarks.results import Row
from models.engines.base import EngineError
from models.engines.local import LocalEngine
from models.reasoning import Settings
from models.records import FailedPath, Question, read_questions
from tests.support.fake_boards import make_workspace
from tests.support.tiny_vlm import lively, picture


def judged(rows: list[Row]) -> dict[str, bool | None]:
    """What has a target, by the begin of its name, and whether it holds."""
    return {row.what.split(",")[0].split(" (")[0]: row.holds for row in rows if row.target}


# the mock server, as the peers use it


def test_the_server_closes_a_connection_that_is_asked_to_be_closed() -> None:
    body = json.dumps({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with MockServer() as server, socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall((head + body).encode())
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200") and b'"hi"' in answer


def test_the_server_names_its_model_and_refuses_a_call_without_messages() -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with MockServer() as server:
        assert json.load(opener.open(f"{server.url}/models"))["data"][0]["id"] == "mock"
        empty = urllib.request.Request(f"{server.url}/chat/completions", b'{"model":"m","messages":[]}')
        with pytest.raises(urllib.error.HTTPError, match="400"):
            opener.open(empty, timeout=10)


# client_overhead


def test_the_floor_is_what_the_calls_in_flight_leave() -> None:
    assert Load(6400, 160).floor_s == pytest.approx(2.0)
    assert Load(161, 160).floor_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("status", "stdout", "stderr", "message"),
    [
        (0, 'noise\n{"wall_s": 2, "cpu_s": 1, "done": 9}\n', "", "answered 9 of 10 calls"),
        (1, "", "Traceback\nModuleNotFoundError: No module named 'x'\n", "failed: ModuleNotFoundError"),
        (0, "", "", "failed: nothing was said"),
    ],
)
def test_a_client_that_did_not_do_its_work_is_told_apart(
    status: int, stdout: str, stderr: str, message: str
) -> None:
    with pytest.raises(PeerError, match=message):
        client_overhead.parse("x", status, stdout, stderr, 10)
    whole = client_overhead.parse("x", 0, '{"wall_s": 2, "cpu_s": 1, "done": 10}', "a warning", 10)
    assert whole == client_overhead.Run(2, 1, 10)


def test_ours_is_judged_by_its_median_and_a_peer_without_a_figure_says_why() -> None:
    def runs(*walls: float) -> list[client_overhead.Run]:
        return [client_overhead.Run(wall, 1.6, 6400) for wall in walls]

    missing = PeerError("distilabel could not be installed: ERROR: no matching distribution")
    found: dict[Any, Any] = {
        BARE: runs(2.0),
        OURS: runs(2.2, 2.4, 2.1),
        CHAINS: runs(9.0),
        PEERS[0]: runs(22.0),
    }
    rows, table = client_overhead.judge(found | {PEERS[2]: missing}, Load(6400, 160))
    assert judged(rows) == {"longview: wall time / floor of 2 s": True, "longview: client CPU a call": True}
    by_name = {row.what: row.value for row in rows}
    assert by_name["longview: client CPU a call"] == pytest.approx(0.25)
    assert by_name[f"{PEERS[0].name}: wall time / ours"] == pytest.approx(10)
    assert by_name[f"distilabel: {missing}"] is None
    assert len(table.rows) == 5 and table.rows[-1][1] == "–"
    rows, _ = client_overhead.judge(found | {OURS: runs(2.4)}, Load(6400, 160))
    assert judged(rows)["longview: wall time / floor of 2 s"] is False


def test_a_peers_environment_is_built_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    monkeypatch.setattr(environments, "REQUIREMENTS", {"x": ("a==1", "b==2")})
    monkeypatch.setattr(environments, "_install", lambda name, command: built.append(command[2]))
    (tmp_path / "x").mkdir()
    for _ in range(2):
        assert environments.interpreter("x", tmp_path) == tmp_path / "x/bin/python"
    assert built == ["venv", "pip"]
    monkeypatch.setattr(environments, "REQUIREMENTS", {"x": ("a==2",)})
    environments.interpreter("x", tmp_path)
    assert built == ["venv", "pip"] * 2


def test_clients_are_run_beside_a_peer_that_cannot_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> Path:
        raise PeerError(f"{name} could not be installed: no network")

    monkeypatch.setattr(client_overhead, "interpreter", refused)
    found = client_overhead.measure(PEERS[:1], Load(32, 16), rounds=1)
    assert [type(runs) for runs in found.values()] == [list, list, list, PeerError]
    assert all(run.done == 32 for client in (BARE, OURS, CHAINS) for run in found[client])


def test_calls_that_make_no_whole_chains_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        client_overhead.arguments(["--calls", "100"])
    assert "a multiple of 16" in capsys.readouterr().err
    assert client_overhead.arguments(["--peers"]).peers == []


# resume


def test_calls_asked_again_are_told_apart_by_whether_their_answer_had_been_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    calls = resume.Calls()
    for call in (b"a", b"b", b"c", b"d"):
        calls.ask(call)
    for at, call in [(1.1, b"a"), (1.31, b"c"), (1.33, b"d")]:
        now = at
        calls.answer(call, 0)
    calls.kills += [1.32, 1.5]
    for call in (b"b", b"c", b"d", b"e"):
        calls.ask(call)
    assert (calls.in_flight, calls.lost, calls.redone, len(calls.asked)) == (2, 1, 3, 5)
    assert calls.ages_ms == pytest.approx([10.0])  # before the kill that lost it, not the last one
    now = 1.6
    calls.answer(b"d", 0)
    calls.ask(b"d")
    assert (calls.in_flight, calls.lost) == (3, 1)  # sent to a stage that was dead: two starts ago


def test_moments_of_kills_are_drawn_from_the_whole_course() -> None:
    drawn = resume.moments(20, 1000, seed=0)
    assert drawn == resume.moments(20, 1000, seed=0) != resume.moments(20, 1000, seed=1)
    for number, moment in enumerate(drawn):
        assert moment == 0 if number % 5 == 4 else 50 * number <= moment < 50 * (number + 1)


def test_resume_judges_what_is_redone_and_what_is_lost() -> None:
    calls = [resume.Calls(asked={bytes([n]) for n in range(200)}) for _ in range(2)]
    calls[1].in_flight, calls[1].lost, calls[1].ages_ms = 1, 1, [12.0]
    whole = resume.Run(calls[0], {"paths.jsonl": "1", "metrics.json": "2"}, 40, 9.0, 1.0)
    killed = replace(whole, calls=calls[1])
    rows, _ = resume.judge(whole, killed, 2)
    assert list(judged(rows).values()) == [True] * 4 and rows[0].value == pytest.approx(1.0)
    for changed, wrong in (
        (
            replace(killed, outputs={"paths.jsonl": "3", "metrics.json": "2"}),
            "files the same as without a kill",
        ),
        (replace(killed, chains=39), "steps or chains lost"),
        (replace(killed, calls=replace(calls[1], ages_ms=[80.0])), "age of the oldest answer lost"),
        (replace(killed, calls=replace(calls[1], lost=9)), "steps redone"),
    ):
        rows, _ = resume.judge(whole, changed, 2)
        assert [what for what, holds in judged(rows).items() if not holds] == [wrong]


def test_a_stage_killed_once_is_measured(tmp_path: Path) -> None:
    whole = resume.run(tmp_path / "a", questions=4, seed=0)
    killed = resume.run(tmp_path / "a", 4, 0, kills=[len(whole.calls.asked) / 2], start_up_s=1.0)
    assert killed.outputs == whole.outputs and "paths.jsonl" in whole.outputs
    assert killed.calls.asked == whole.calls.asked and killed.chains == whole.chains == 16
    assert whole.calls.redone == 0 and len(killed.calls.kills) == 1


# chains_memory


@pytest.mark.parametrize("count", [1, 250, 2500])
def test_questions_made_as_they_are_asked_for_are_all_different(count: int) -> None:
    questions = chains_memory.Questions(count)
    ids = [question.id for question in questions]
    assert len(set(ids)) == len(questions) == count and questions[0] == next(iter(questions))
    assert count < 100 or ids != sorted(ids)


def test_memory_and_time_are_judged_from_the_fewest_chains_to_the_most() -> None:
    few = [chains_memory.Run(1000, seconds, 50.0, 1.0) for seconds in (1.0, 9.0, 1.1)]
    many = chains_memory.Run(100_000, 120.0, 55.0, 100.0)
    rows, _ = chains_memory.judge([few, [many]])
    assert judged(rows) == {"peak memory": True, "time a chain": True}
    assert [row.value for row in rows[:2]] == pytest.approx([1.1, 120 / 110])
    rows, _ = chains_memory.judge([few, [replace(many, seconds=150.0, peak_mib=70.0)]])
    assert judged(rows) == {"peak memory": False, "time a chain": False}


def test_a_few_chains_are_measured_in_a_process_of_their_own() -> None:
    one = chains_memory.run_apart(400)
    assert one.chains == 400 and one.seconds > 0 and one.peak_mib > 10 and one.disk_mib > 0


# local_engine


def test_plain_generate_and_the_local_engine_do_the_same_work(tiny_model: Any, tiny_processor: Any) -> None:
    model = lively(tiny_model(3))
    questions = [Question(f"q{n}", [f"picture {n}"], "Sum?" + " more" * n, "7") for n in range(5)]
    work = local_engine.Work(questions, 2, Settings("short", 1, 2, 12, 1, 0.0, 1.0, 1.0), Path(), Path(), 4)
    runs = [
        local_engine.run(engine(model, tiny_processor, picture, 4), work)
        for engine in (local_engine.PlainEngine, LocalEngine)
    ]
    assert runs[0].chains == runs[1].chains
    assert all(isinstance(chain, FailedPath) and chain.text for chain in runs[0].chains)


def test_the_local_engine_is_judged_by_seconds_and_by_equal_chains() -> None:
    path = FailedPath("q", 0, "not JSON")
    plain, local = local_engine.Run(6.0, [path, path]), local_engine.Run(2.0, [path, path])
    found = {local_engine.PLAIN: [plain], local_engine.LOCAL: [local]}
    rows, _ = local_engine.judge(found, 8)
    assert [row.holds for row in rows if row.target] == [True, True] and rows[0].value == pytest.approx(3)
    found[local_engine.LOCAL] = [replace(local, seconds=2.1, chains=[path, replace(path, reason="cut off")])]
    rows, _ = local_engine.judge(found, 8)
    assert [row.holds for row in rows if row.target] == [False, False]


def test_a_folder_without_a_generator_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no generator: run `make demo` there first"):
        local_engine.read_work(tmp_path, 4)


# generation


@pytest.fixture
def work(tmp_path: Path) -> generation.Work:
    """Two questions, three chains each."""
    return generation.Work(traces.drawn(questions=2, samples=3), Path("m"), 5, tmp_path)


def test_all_clients_are_asked_the_same_calls(work: generation.Work) -> None:
    engine = traces.Told(work.trace)
    run = generation.sample(engine, work, 7)
    asked = traces.calls(work.numbered(7))
    assert {call.key: call for call in engine.asked} == {call.key: call for call in asked}
    assert run.calls == run.tokens == len(asked) == sum(len(chain.steps) + 1 for chain in work.trace.chains)


def test_an_engine_that_writes_other_chains_is_refused(work: generation.Work) -> None:
    first, *others = work.trace.chains
    for changed in (replace(first, answer="other"), replace(first, steps=first.steps[-1:])):
        with pytest.raises(EngineError, match="did not write the trace's chains"):
            generation.sample(traces.Told(replace(work.trace, chains=[changed, *others])), work, 8)
    swapped = [replace(chain, sample=2 - chain.sample) for chain in work.trace.chains]
    generation.sample(traces.Told(replace(work.trace, chains=swapped)), work, 9)


def test_a_trace_is_asked_by_question_sample_and_step(work: generation.Work) -> None:
    asked = traces.calls(work.trace)
    first = work.trace.chains[0]
    steps = [f"q0000/0/{n}.0" for n in range(1, len(first.steps) + 1)]
    assert [call.key for call in asked[: len(steps) + 1]] == [*steps, "q0000/0/answer"]
    for shorter, longer in itertools.pairwise(call.prompt.turns for call in asked[: len(steps) + 1]):
        assert len(longer) == len(shorter) + 1 and longer[0][0] == shorter[0][0]


def test_the_script_holds_prompt_and_text_of_every_call(work: generation.Work, tiny_processor: Any) -> None:
    trace, tokenizer = work.numbered(0), tiny_processor.tokenizer
    traces.write_script(trace, tiny_processor, work.boards, work.script)
    script = json.loads(work.script.read_text())
    texts = list(trace.texts.values())
    assert [tokenizer.decode(text) for _, text in script] == [text + tokenizer.eos_token for text in texts]
    for (prompt, _), call in zip(script, traces.calls(trace), strict=True):
        assert prompt.count(tiny_processor.image_token_id) == 9 and len(call.prompt.turns) > 0


def test_every_run_has_boards_of_its_own(work: generation.Work) -> None:
    files = [work.boards / work.numbered(n).chains[0].question.images[0] for n in (3, 4)]
    assert len({file.read_bytes() for file in files}) == 2
    assert work.begin(1).trace.questions == work.trace.questions[:1]


def test_what_a_checkout_has_sampled_is_a_trace(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no chains: run `make demo`"):
        traces.recorded(tmp_path, 4)
    make_workspace(tmp_path, questions=8)
    asked = read_questions(tmp_path / "data/records.jsonl", pool="generate")
    step = {"title": "Guess", "content": "7", "next_action": "final_answer"}
    (tmp_path / "artifacts/generate").mkdir(parents=True)
    with (tmp_path / "artifacts/generate/paths.jsonl").open("w") as file:
        for number, question in enumerate(asked[:5]):
            for sample in range(1 if number == 1 else 2):  # a chain of the second has failed
                path = {"question_id": question.id, "sample": sample, "steps": [step], "answer": "7"}
                file.write(json.dumps(path) + "\n")
    trace = traces.recorded(tmp_path, 3)
    assert [question.id for question in trace.questions] == [asked[n].id for n in (0, 2, 3)]
    assert trace.samples == 2 and trace.boards.keys() == {q.images[0] for q in trace.questions}


def test_sampling_is_judged_by_the_rounds_in_which_both_ran() -> None:
    def runs(*rates: float) -> list[generation.Run]:
        return [generation.Run(100 / rate, 100, 4000, 9000, 6000) for rate in rates]

    found = {
        generation.ONE: runs(4, 2, 4),
        generation.BOUND: runs(60, 30, 60),
        generation.OURS: runs(57, 27, 54),
        generation.SERVED: runs(36, 24, 39),
    }
    rows, table = generation.judge(found)
    assert [row.holds for row in rows if row.target] == [True, True, False, False]
    assert [row.value for row in rows if row.target] == pytest.approx([13.5, 0.9, 9.75, 0.65])
    assert len(table.rows) == 4 and table.rows[2][3] == "67%"
