"""Every stage up to the evaluation: real training of a tiny model, fake engines where models are sampled."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.records import Question, read_jsonl, read_paths, read_questions
from tasks import (
    assess,
    curate,
    dpo,
    evaluate,
    foundation,
    generate,
    instruct,
    judge,
    params,
    reasoning_sft,
    roles,
    rounds,
    sample,
    score,
    summary_data,
    summary_sft,
)
from tasks.engines import open_engine as real_open_engine
from tasks.stage import StageError
from tests.support.fake_boards import Engines, Killed, contents, make_workspace

ROUND = ["--round", "r1"]
STAGES: list[tuple[Any, list[str], str]] = [
    (instruct, [], "instruct"),
    (foundation, [], "foundation"),
    (judge, [], "judge"),
    (generate, [], "generate"),
    (assess, [], "assess"),
    (curate, [], "curate"),
    (reasoning_sft, [], "reasoning_sft"),
    (summary_data, [], "summary_data"),
    (summary_sft, [], "summary_sft"),
    (evaluate, ["--system", "base"], "evaluate/base"),
    (evaluate, ["--system", "multi_agent"], "evaluate/multi_agent"),
    (sample, ROUND, "rounds/r1/sample"),
    (score, ROUND, "rounds/r1/score"),
    (dpo, ROUND, "rounds/r1/dpo"),
    (evaluate, ["--system", "r1"], "evaluate/r1"),
]


def run(module: Any, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout in which every stage has run."""
    folder = make_workspace(tmp_path_factory.mktemp("dry"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LONGVIEW_TRACKING", "off")
        patch.setattr("tasks.engines.open_engine", Engines("data/records.jsonl"))
        for module, arguments, _ in STAGES:
            run(module, arguments)
        yield folder


@pytest.fixture
def metrics(workspace: Path) -> Any:
    return lambda stage: json.loads((workspace / "artifacts" / stage / "metrics.json").read_text())


def rows(path: str) -> list[dict[str, Any]]:
    return list(read_jsonl(f"artifacts/{path}.jsonl"))


def questions() -> dict[str, Question]:
    return roles.by_id(read_questions("data/records.jsonl"))


@pytest.mark.parametrize("out", [out for _, _, out in STAGES])
def test_every_stage_is_whole(workspace: Path, out: str) -> None:
    manifest = json.loads((workspace / "artifacts" / out / "manifest.json").read_text())
    assert manifest["inputs"] and manifest["params"]["seed"] == 0
    assert str(workspace) not in json.dumps(manifest)
    assert (workspace / "artifacts" / out / "metrics.json").is_file()


def test_nothing_is_left_in_scratch(workspace: Path) -> None:
    assert not [p for p in (workspace / ".work").rglob("*") if p.is_file() and p.name != "fingerprints.json"]


@pytest.mark.parametrize(
    "checkpoint",
    [
        "foundation/base",
        "foundation/generator",
        "reasoning_sft/checkpoint",
        "summary_sft/checkpoint",
        "rounds/r1/dpo/checkpoint",
    ],
)
def test_every_checkpoint_loads_and_says_what_its_probe_says(workspace: Path, checkpoint: str) -> None:
    from models.probe import DECIMALS, read_probe, take
    from models.vlm import load

    model, processor = load(workspace / "artifacts" / checkpoint)
    assert len(processor.tokenizer) == model.config.get_text_config().vocab_size
    again, written = take(model, processor), read_probe(workspace / "artifacts" / checkpoint)
    assert written is not None and replace(again, log_probs=[]) == replace(written, log_probs=[])
    last_decimal = 10**-DECIMALS  # a value half-way between two may be rounded to either
    assert again.log_probs == pytest.approx(written.log_probs, rel=0, abs=1.01 * last_decimal)
    assert {p.suffix for p in (workspace / "artifacts" / checkpoint).iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
    }


def test_curate_takes_the_best_right_path_of_a_question_and_labels_by_truth(workspace: Path) -> None:
    assessed = {(p.question_id, p.sample): p for p in read_paths("artifacts/assess/paths.jsonl")}
    best = read_paths("artifacts/curate/reasoning.jsonl")
    assert len({p.question_id for p in best}) == len(best)
    for path in best:
        others = [p for (q, _), p in assessed.items() if q == path.question_id and p.right]
        assert path.right and path.score == max(p.score or 0 for p in others)
    right = {p.question_id for p in assessed.values() if p.right}
    assert {p.question_id for p in best} == right


def test_assess_scores_right_paths_only_and_filters_all(workspace: Path, metrics: Any) -> None:
    paths, asked = read_paths("artifacts/assess/paths.jsonl"), questions()
    for path in paths:
        right = path.answer == asked[path.question_id].answer
        assert path.right is True if right else not path.right  # None: "7" to a question for yes or no
        assert (path.score is not None) == right
    assert len(paths) == metrics("generate")["paths"] == sum(metrics("assess")["filtered"].values())
    assert metrics("assess")["agreement"]["auc"] is None  # rules score by the answers: nothing is measured


def test_pairs_are_right_against_wrong_of_the_same_question(workspace: Path, metrics: Any) -> None:
    pairs, numbers = rows("rounds/r1/score/pairs"), metrics("rounds/r1/score")
    paths = read_paths("artifacts/rounds/r1/score/paths.jsonl")
    assert len(pairs) == numbers["pairs"]["kept"] > 0
    for pair in pairs:  # the profile cuts pairs to the first step that differs
        sides = {
            right: [
                p.text for p in paths if p.question_id == pair["question_id"] and (p.right is True) == right
            ]
            for right in (True, False)
        }
        assert any(text.startswith(pair["prefix"] + pair["chosen"]) for text in sides[True])
        assert any(text.startswith(pair["prefix"] + pair["rejected"]) for text in sides[False])
        assert pair["chosen"] != pair["rejected"] and pair["chosen"].count("\n") <= 1
        assert pair["margin"] == pair["chosen_score"] - pair["rejected_score"] > 0
    dropped, paired = numbers["pairs"]["dropped"], {pair["question_id"] for pair in pairs}
    assert len(paired) + dropped.get("all_right", 0) + dropped.get("all_wrong", 0) <= numbers["questions"]
    assert len(paired) + sum(dropped.values()) >= numbers["questions"]
    assert {"mean", "chosen_mean", "rejected_mean"} <= numbers["length"].keys()
    assert numbers["paths"] + numbers["failed"] == 12 * 4
    assert metrics("rounds/r1/dpo")["pairs"] == len(pairs)


def test_evaluation_asks_both_agents_and_the_limit_holds(workspace: Path, metrics: Any) -> None:
    for system in ("base", "multi_agent", "r1"):
        predictions = rows(f"evaluate/{system}/predictions")
        assert len(predictions) == 4 * 6  # two splits of two sets, six of each
        assert {(p["split"], p["set"]) for p in predictions} == {
            (split, kind) for split in ("validation", "test") for kind in ("reasoning", "perception")
        }
        for p in predictions:
            assert p["right"] == (p["answer"] == p["truth"])
            assert (p["reasoning"] is None) == (system == "base")
        accuracy = metrics(f"evaluate/{system}")["accuracy"]["test"]["reasoning"]
        of = [p["right"] for p in predictions if (p["split"], p["set"]) == ("test", "reasoning")]
        assert accuracy["mean"] == pytest.approx(sum(of) / len(of), abs=1e-6)
    ids = [[p["id"] for p in rows(f"evaluate/{system}/predictions")] for system in ("base", "r1")]
    assert ids[0] == ids[1]


def test_no_held_out_image_is_trained_on(workspace: Path) -> None:
    asked = questions()
    trained = {image for q in asked.values() if q.split == "train" for image in q.images}
    assert not trained & {p["image"] for p in rows("evaluate/base/predictions")}


def test_training_again_gives_the_same_bytes(workspace: Path) -> None:
    before = contents(workspace / "artifacts/reasoning_sft")
    run(reasoning_sft, [])
    assert contents(workspace / "artifacts/reasoning_sft") == before


def test_a_foundation_killed_between_its_models_keeps_the_first(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(workspace / "artifacts/foundation")
    train = foundation._train
    trained: list[str] = []

    def killed(role: str, *rest: Any) -> Any:
        if role == "generator":
            raise Killed
        return train(role, *rest)

    def noted(role: str, *rest: Any) -> Any:
        trained.append(role)
        return train(role, *rest)

    monkeypatch.setattr(foundation, "_train", killed)
    with pytest.raises(Killed):
        run(foundation, [])
    monkeypatch.setattr(foundation, "_train", noted)
    run(foundation, [])
    assert trained == ["generator"] and contents(workspace / "artifacts/foundation") == before


def test_a_trained_judge_killed_before_it_is_published_trains_no_second_time(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = params.load("judge", judge.Params)
    budget = params.load("foundation.base", judge.Budget)
    settings = judge.Params(**{**p.__dict__, "kind": "model", "budget": budget, "held_out_questions": 2})
    load = params.load

    def use_settings() -> None:
        monkeypatch.setattr(params, "load", lambda name, *a: settings if name == "judge" else load(name, *a))
        monkeypatch.setattr("tasks.engines.open_engine", real_open_engine)

    use_settings()
    rules = contents(workspace / "artifacts/judge")
    train, times = judge._train, []
    monkeypatch.setattr(judge, "_train", lambda *a: (times.append(1), train(*a))[1])
    monkeypatch.setattr(judge, "held_out_agreement", lambda *a: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run(judge, [])
    monkeypatch.undo()
    use_settings()
    monkeypatch.setattr(judge, "_train", lambda *a: (times.append(1), train(*a))[1])
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    monkeypatch.chdir(workspace)
    run(judge, [])
    numbers = json.loads(Path("artifacts/judge/metrics.json").read_text())
    whole = Path("artifacts/judge/checkpoint/model.safetensors").is_file()
    monkeypatch.undo()
    run(judge, [])
    assert contents(workspace / "artifacts/judge") == rules
    lessons = len(judge._lessons(settings.prompts, workspace / "artifacts/instruct"))
    steps = math.ceil(lessons / budget.batch_size) * budget.epochs
    assert whole and len(times) == 1 and numbers["training"]["steps"] == steps
    assert numbers["agreement"]["unreadable"] == 2  # two steps teach nothing


def test_rounds_without_pairs_fail_with_advice(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import pairing

    monkeypatch.setitem(pairing.RULES, "best_right_vs_worst_wrong", lambda paths, pairs: "all_right")
    with pytest.raises(StageError, match=r"round 1 gave no preference pair.*raise the temperature"):
        run(score, ROUND)
    monkeypatch.undo()
    run(score, ROUND)


def test_an_unknown_round_is_named(workspace: Path) -> None:
    with pytest.raises(params.ParamsError, match="r7"):
        rounds.load("r7")
