"""GRPO: rewards rise, prompts are those that are served, resumed == uninterrupted, equal rewards fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.grpo import Grpo, policy_trainer, train_grpo
from models.guard import TrainingError
from models.training import Budget
from models.vlm import Conversation, Encoder
from tests.support.tiny_vlm import picture

QUESTIONS = [Conversation([f"picture {n}"], [(f"What is the sum of row {n % 3 + 1}?", "")]) for n in range(8)]
GRPO = Grpo(generations=8, max_new_tokens=8)
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


def test_groups_of_equal_rewards_fail(grpo: Any) -> None:
    with pytest.raises(TrainingError, match="equal rewards"):
        grpo(replace(BUDGET, max_steps=2), reward=lambda indices, completions: [1.0] * len(completions))
