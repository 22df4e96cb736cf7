"""Stages that sample, killed and run again: the same bytes as without a kill, and nothing asked for twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.records import read_jsonl
from tasks import generate, roles, sample, summary_data
from tasks.stage import StageError
from tests.support.fake_boards import Engines, Killed, contents, make_workspace, stand_in

GENERATOR, REASONER = "artifacts/foundation/generator", "artifacts/reasoning_sft/checkpoint"
STAGES: dict[str, tuple[Callable[[], None], str, list[str]]] = {
    "generate": (generate.main, "artifacts/generate", []),
    "summary_data": (summary_data.main, "artifacts/summary_data", []),
    "sample": (sample.main, "artifacts/rounds/r1/sample", ["--round", "r1"]),
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    make_workspace(tmp_path, overrides=OVERRIDES)
    stand_in(tmp_path, GENERATOR, REASONER)
    curated = [
        {"piece": "wrong", "question_id": "generate-00001", "text": "<thoughts>\nAnswer: 99\n</thoughts>"}
    ]
    (tmp_path / "artifacts/curate").mkdir()
    (tmp_path / "artifacts/curate/summary.jsonl").write_text(json.dumps(curated[0]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


OVERRIDES = {
    "generate": {"questions": 12, "samples": 2, "chunk": 4, "chain": {"attempts": 1}},
    "summary_data": {"questions": 12, "chunk": 4},
    "sample": {"questions": 12, "samples": 3, "chunk": 4},
}


@pytest.fixture
def run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Engines, dict[str, bytes]]]:
    """run(stage, kill_after): the stage's main with fake engines; returns them and the bytes written."""

    def call(stage: str, kill_after: int | None = None) -> tuple[Engines, dict[str, bytes]]:
        main, out, arguments = STAGES[stage]
        engines = Engines("data/records.jsonl", kill_after)
        monkeypatch.setattr("tasks.engines.open_engine", engines)
        monkeypatch.setattr(sys, "argv", [stage, *arguments])
        if kill_after is None:
            main()
        else:
            with pytest.raises(Killed):
                main()
            assert not Path(out, "manifest.json").exists(), "a killed stage looks complete"
        return engines, contents(Path(out))

    return call


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_run_again_gives_the_same_bytes_and_asks_only_for_the_rest(stage: str, run: Any) -> None:
    engines, whole = run(stage)
    everything = engines.engine.requests
    run(stage, kill_after=everything // 2)
    again, resumed = run(stage)
    assert resumed == whole
    assert 0 < again.engine.requests < everything


@pytest.mark.parametrize("stage", STAGES)
def test_a_replay_sends_no_request(stage: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the last reply, before the output was published."""
    _, whole = run(stage)
    from tasks.stage import StageRun

    publish = StageRun.metrics

    def killed(self: Any, metrics: Any) -> None:
        raise Killed

    monkeypatch.setattr(StageRun, "metrics", killed)
    with pytest.raises(Killed):
        run(stage)
    monkeypatch.setattr(StageRun, "metrics", publish)
    engines, replayed = run(stage)
    assert replayed == whole and engines.engine.requests == 0


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_asks_anew(stage: str, run: Any) -> None:
    _, whole = run(stage)
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("seed: 0", "seed: 1"))
    engines, other = run(stage)
    assert engines.engine.requests and other != whole


def test_generate_keeps_every_chain_or_its_failure(run: Any) -> None:
    engines, files = run("generate")
    assert engines.checkpoints == [GENERATOR]
    paths, failures = (list(read_jsonl(f"artifacts/generate/{f}.jsonl")) for f in ("paths", "failures"))
    numbers = json.loads(files["metrics.json"])
    assert len(paths) + len(failures) == 24 == numbers["paths"] + numbers["failed"]
    assert {(row["question_id"], row["sample"]) for row in paths + failures} == {
        (row["question_id"], n) for row in paths + failures for n in range(2)
    }
    assert failures and numbers["failures"] == {"not JSON": len(failures)}
    records = {row["id"]: row for row in read_jsonl("data/records.jsonl")}
    assert all(records[row["question_id"]]["pool"] == "generate" for row in paths)
    assert sum(numbers["steps"].values()) == len(paths)


def test_a_generator_that_finishes_no_chain_fails_and_says_why(
    workspace: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import fake_boards

    monkeypatch.setattr(fake_boards.BoardEngine, "_reply", lambda *_: "I am only a small model")
    with pytest.raises(StageError, match=r"none of 24 chains was finished: \{'not JSON': 24\}"):
        run("generate")
    with pytest.raises(StageError, match=r"none of 36 sampled paths could be read"):
        run("sample")


def test_the_summary_set_is_curated_pieces_and_what_the_reasoner_writes(run: Any) -> None:
    engines, files = run("summary_data")
    assert engines.checkpoints == [REASONER]
    rows = [json.loads(line) for line in files["records.jsonl"].splitlines()]
    numbers = json.loads(files["metrics.json"])
    assert numbers["records"] == len(rows) and numbers["pieces"]["wrong"] == 1
    assert numbers["pieces"]["reasoner"] + numbers["failed"] + numbers["left_out"] == 24
    kept = [row["question_id"] for row in rows if row["piece"] == "reasoner"]
    assert len(kept) == len(set(kept)) <= 12
    records = {row["id"]: row for row in read_jsonl("data/records.jsonl")}
    assert all(row["answer"] == records[row["question_id"]]["answer"] for row in rows)


def test_each_round_asks_questions_that_no_round_before_asked(workspace: Path) -> None:
    asked = [q.id for t in range(3) for q in roles.training_questions("rounds", 16, offset=16 * t)]
    assert len(set(asked)) == len(asked) == 48 and roles.training_questions("rounds", 16)[0].id == asked[0]
    around = roles.training_questions("rounds", 16, offset=40)
    assert [q.id for q in around] == [*asked[40:], *asked[:8]]
    assert len(roles.training_questions("rounds", 1000)) == 48
    with pytest.raises(StageError, match="no training questions for r9"):
        roles.training_questions("r9", 1)


def test_sample_is_on_the_policy_and_reads_the_answer_from_the_last_step(run: Any) -> None:
    engines, files = run("sample")
    assert engines.checkpoints == [REASONER]
    rows = [json.loads(line) for line in files["paths.jsonl"].splitlines()]
    numbers = json.loads(files["metrics.json"])
    assert numbers["paths"] == len(rows) and numbers["paths"] + numbers["failed"] == 36
    assert all(row["answer"] == row["steps"][-1]["content"] for row in rows)
    assert all(row["question_id"].startswith("rounds") for row in rows)


def test_a_policy_that_has_run_away_in_length_ends_the_round(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import fake_boards

    answer = fake_boards.BoardEngine.ask

    async def cut(self: Any, request: Any) -> Any:
        """Two paths of three end at the limit."""
        reply = await answer(self, request)
        return reply if request.key.endswith("/0") else replace(reply, finished=False)

    monkeypatch.setattr(fake_boards.BoardEngine, "ask", cut)
    with pytest.raises(StageError, match=r"67% of 36 sampled paths reach the limit of \d+ tokens: artifacts"):
        run("sample")
    assert not Path("artifacts/rounds/r1/sample/manifest.json").exists()


def test_what_is_journalled_belongs_to_its_settings(workspace: Path) -> None:
    from dataclasses import replace

    from tasks.sampling import sample_reasoner
    from tests.support.fake_boards import BoardEngine

    settings = sample.Params(prompts="short", questions=4, samples=2, chunk=4)
    asked = roles.training_questions("rounds", 4)

    def requests(p: Any, seed: int = 0, questions: Any = asked) -> int:
        engine = BoardEngine("data/records.jsonl")
        rows: list[Any] = []
        sample_reasoner(engine, questions, p, seed, workspace / "scratch", take=rows.append)
        assert len(rows) == len(questions) * p.samples
        return engine.requests

    assert [requests(settings), requests(settings)] == [8, 0]
    for changed in ({"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 9}, {"samples": 1}):
        assert requests(replace(settings, **changed)) > 0, changed
    assert requests(settings, seed=1) == 8 and requests(settings, questions=asked[::-1]) == 8
    assert requests(settings) == 0


@pytest.mark.parametrize(("stage", "samples"), [("generate", 6), ("sample", 6)])
def test_a_question_with_enough_right_and_wrong_chains_gets_no_more(
    workspace: Path, run: Any, stage: str, samples: int
) -> None:
    from models.answers import matches

    overrides = {name: {**OVERRIDES[name], "samples": samples} for name in (stage,)}
    make_workspace(workspace, overrides={**OVERRIDES, **overrides})
    engines, _ = run(stage)
    all_of_them = engines.engine.requests
    stop = {stage: {**overrides[stage], "stop": {"right": 1, "wrong": 1}}}
    make_workspace(workspace, overrides={**OVERRIDES, **stop})
    engines, files = run(stage)
    assert engines.engine.requests < all_of_them
    truth = {row["id"]: row["answer"] for row in read_jsonl("data/records.jsonl")}
    right: dict[str, list[bool | None]] = {}
    for row in (json.loads(line) for line in files["paths.jsonl"].splitlines()):
        known = matches(row["answer"], truth[row["question_id"]])
        right.setdefault(row["question_id"], []).append(known)
    failed = [json.loads(line)["question_id"] for line in files["failures.jsonl"].splitlines()]
    chains = {name: len(right.get(name, [])) + failed.count(name) for name in {*right, *failed}}
    assert len(chains) == 12 and min(chains.values()) >= 2 and min(chains.values()) < samples
    for name, count in chains.items():
        both = {True, False} <= set(right.get(name, []))
        assert count == samples or both, name


def test_numbers_of_enough_chains_are_checked() -> None:
    from tasks.params import ParamsError, parse

    with pytest.raises(ParamsError, match=r"generate\.stop: stop: expected numbers"):
        parse({"stop": {"right": 0, "wrong": 0}}, generate.Params, "params.yaml: generate")
