"""GRPO: rewards rise, prompts are those that are served, resumed == uninterrupted, equal rewards fail."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.agents import reason_prompt
from models.engines.base import Sampling
from models.grpo import Grpo, draw, policy_trainer, train_grpo
from models.guard import TrainingError
from models.reasoning import thoughts
from models.records import Step, read_jsonl, read_questions, write_jsonl
from models.sft import train_sft
from models.tiny import build_model, build_processor, train_tokenizer
from models.training import Budget
from models.vlm import Conversation, Encoder, load, save
from tasks import dpo
from tasks.stage import StageError, write_json
from tests.support.fake_boards import make_workspace, stand_in
from tests.support.tiny_vlm import CONFIG, picture

QUESTIONS = [Conversation([f"picture {n}"], [(f"What is the sum of row {n % 3 + 1}?", "")]) for n in range(8)]
GRPO = Grpo(generations=8, max_new_tokens=8)
OVERRIDES = {
    "grpo": {
        "group": {"generations": 4, "max_new_tokens": 24},
        "budget": {"batch_size": 8, "learning_rate": 1.0e-3},
    },
    "rounds": {"r1": {"trainer": "grpo"}},
}
BUDGET = Budget(max_steps=24, batch_size=32, learning_rate=3e-3, save_steps=2)


def share_of_e(indices: Any, completions: Any) -> list[float]:
    """More of the letter e is better."""
    return [text.count("e") / 8 for text in completions]


@pytest.fixture
def grpo(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> Any:
    def train(budget: Budget = BUDGET, reward: Any = share_of_e, report: Any = None) -> Any:
        model = tiny_model()
        return model, train_grpo(
            model, tiny_processor, QUESTIONS, reward, GRPO, budget, tmp_path / "steps", 7, picture, report
        )

    return train


def test_the_reward_rises_and_the_vision_tower_rests(grpo: Any, tiny_model: Any) -> None:
    before = dict(tiny_model().named_parameters())
    model, numbers = grpo()
    assert numbers["last_reward"] > 2 * numbers["first_reward"] > 0
    for name, weight in model.named_parameters():
        if ".vision_model." in name:
            assert bool((weight == before[name]).all()), name


def test_prompts_are_those_that_are_served(tiny_processor: Any) -> None:
    from trl.data_utils import prepare_multimodal_messages

    encoder = Encoder(tiny_processor, picture)
    encoder.prepare(["picture 0"])
    trainer = policy_trainer(encoder, QUESTIONS)
    own = trainer.__new__(trainer)
    own._asked = QUESTIONS[:2]
    prompts = [
        prepare_multimodal_messages(
            [{"role": "user", "content": question.turns[0][0]}], images=[picture(question.images[0])]
        )
        for question in own._asked
    ]
    ids, _, tensors = own._tokenize_prompts(prompts)
    templated = tiny_processor.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert ids == [list(row) for row in templated["input_ids"]]
    assert tensors["pixel_values"].tolist() == [
        encoder.pixels(question.images)["pixel_values"][0].tolist() for question in own._asked
    ]


def test_draws_hang_on_step_question_and_sample_alone(tiny_model: Any, tiny_processor: Any) -> None:
    encoder, model = Encoder(tiny_processor, picture), tiny_model()
    encoder.prepare(["picture 0"])
    two = [*QUESTIONS[:1] * 4, *QUESTIONS[1:2] * 4]
    sampling = Sampling(5.0, max_new_tokens=40)  # hot: every token has its chance
    drawn = draw(model, encoder, two, sampling, (7, 0))
    assert len({tuple(ids) for ids in drawn}) == 8
    assert tiny_processor.image_token_id not in {token for ids in drawn for token in ids}
    assert draw(model, encoder, two[4:], sampling, (7, 0)) == drawn[4:]
    assert draw(model, encoder, two, sampling, (7, 1)) != drawn


def test_a_resumed_run_ends_as_an_uninterrupted_one(grpo: Any) -> None:
    budget = replace(BUDGET, max_steps=4)
    whole, _ = grpo(budget)

    def kill(numbers: dict[str, float], step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo(budget, report=kill)
    resumed, _ = grpo(budget)
    others = dict(resumed.named_parameters())
    assert all(bool((weight == others[name]).all()) for name, weight in whole.named_parameters())


def test_half_groups_are_refused(grpo: Any) -> None:
    with pytest.raises(TrainingError, match="no whole groups of 8"):
        grpo(replace(BUDGET, batch_size=12))


def test_groups_of_equal_rewards_fail(grpo: Any) -> None:
    with pytest.raises(TrainingError, match="equal rewards"):
        grpo(replace(BUDGET, max_steps=2), reward=lambda indices, completions: [1.0] * len(completions))


RIGHT, WRONG = {"sample": 0, "right": True}, {"sample": 1, "right": False}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout before its first round trains: a policy that guesses in the form of a chain, and the paths
    of eight questions, two of which it always answers right."""
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    make_workspace(tmp_path, questions=60, overrides=OVERRIDES)
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path, "artifacts/foundation/generator")
    (tmp_path / "artifacts/judge").mkdir()
    write_json(tmp_path / "artifacts/judge/judge.json", {"kind": "rules"})
    pool = read_questions("data/records.jsonl", split="train", pool="rounds")
    questions = [question for question in pool if question.answer in ("yes", "no", "even", "odd")]
    guesses = [
        Conversation(
            q.images, [(*reason_prompt("short", q).turns[0][:1], thoughts([Step("Guess", q.answer)]))]
        )
        for q in questions
    ]
    tokenizer = train_tokenizer([text for guess in guesses for text in guess.turns[0]], CONFIG.vocabulary)
    processor = build_processor(tokenizer, CONFIG)
    torch.manual_seed(0)
    model = build_model(CONFIG, tokenizer)
    learning = Budget(max_steps=120, batch_size=8, learning_rate=4e-3, optimizer="muon")
    train_sft(model, processor, guesses, learning, tmp_path / "steps", 0)
    save(model, processor, tmp_path / "artifacts/reasoning_sft/checkpoint")
    path = {"steps": [{"title": "Guess", "content": "7"}], "text": "", "answer": "7"}
    kinds = [[RIGHT, WRONG]] * 6 + [[RIGHT, {**RIGHT, "sample": 1}]] * 2
    rows = [
        {"question_id": q.id, **path, **row}
        for q, kind in zip(questions, kinds, strict=False)
        for row in kind
    ]
    write_jsonl(tmp_path / "artifacts/rounds/r1/score/paths.jsonl", rows)
    return tmp_path


def test_a_round_trains_on_questions_of_middling_difficulty(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo", "--round", "r1"])
    dpo.main()
    out = checkout / "artifacts/rounds/r1/dpo"
    numbers, made = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "manifest"))
    assert (numbers["questions"], numbers["left_out"], numbers["steps"]) == (6, 2, 3)
    assert numbers["first_reward"] > 0 and made["params"]["group"]["generations"] == 4
    assert made["stage"] == "dpo@r1" and "artifacts/judge" in made["inputs"]
    before, _ = load("artifacts/reasoning_sft/checkpoint")
    after, _ = load(out / "checkpoint")
    assert any(bool((a != b).any()) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_round_without_such_questions_fails_with_advice(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = checkout / "artifacts/rounds/r1/score/paths.jsonl"
    write_jsonl(paths, [row for row in read_jsonl(paths) if row["right"]])
    monkeypatch.setattr(sys, "argv", ["dpo", "--round", "r1"])
    with pytest.raises(StageError, match="no question with right and wrong paths"):
        dpo.main()
