"""Preference training with TRL (METHOD 1.4, 3): MPO by default, plain DPO and its relatives by parameter.

from models.preference import PreferenceLoss, train_preference
budget = Budget(learning_rate=5e-7)
train_preference(model, reference, processor, pairs, PreferenceLoss(), budget, ".work/dpo", seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.families import token_types
from models.images import ImageSource
from models.training import (
    Budget,
    Guard,
    Report,
    TrainingError,
    arguments,
    bucketed,
    callback,
    freeze_vision,
    optimizer,
    run_trainer,
)
from models.vlm import Conversation, Encoder, pad, stack_pixels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class PreferenceLoss:
    """TRL's loss names with weights. Default: MPO, 0.8 DPO + 0.2 BCO + 1.0 NLL of the chosen
    (arXiv 2411.10442, eq. 2)."""

    types: list[str] = field(default_factory=lambda: ["sigmoid", "bco_pair", "sft"])
    weights: list[float] = field(default_factory=lambda: [0.8, 0.2, 1.0])
    beta: float = 0.1


@dataclass(frozen=True)
class PreferenceExample:
    """An open prompt (images, question) with the preferred and the dispreferred completion.

    prefix: the beginning of the answer that both share, read but not trained on; *_goes_on: that completion
    is cut before its end, and gets no end of turn.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    prefix: str = ""
    chosen_goes_on: bool = False
    rejected_goes_on: bool = False


class PreferenceCollator:
    """Encoded pairs to TRL's layout: the chosen rows first, then the rejected ones."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, completion_mask [2 x rows, longest], and the image tensors twice."""
        completions = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        prompts = [row["prompt"] for row in rows] * 2
        ids = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        masks = [
            [0] * len(prompt) + [1] * len(completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        input_ids = pad(ids, self.encoder.tokenizer.pad_token_id, left=False)
        return {
            "input_ids": input_ids,
            "attention_mask": pad([[1] * len(row) for row in ids], 0, left=False),
            "completion_mask": pad(masks, 0, left=False),
            **token_types(self.encoder.processor, input_ids),
            **stack_pixels(self.encoder, [row["images"] for row in rows] * 2),
        }


def encode_pairs(
    encoder: Encoder, pairs: Sequence[PreferenceExample], max_tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows {"images", "prompt", "chosen", "rejected", "length"} of token ids,
    and how many pairs were too long and left out."""
    rows, long = [], 0
    first = next((pair.prompt.images for pair in pairs if pair.prompt.images), None)
    if first:
        encoder.prepare(first)
    for pair in pairs:
        prompt = encoder.prompt(pair.prompt) + encoder.answer_ids(pair.prefix, goes_on=True)
        chosen = encoder.answer_ids(pair.chosen, pair.chosen_goes_on)
        rejected = encoder.answer_ids(pair.rejected, pair.rejected_goes_on)
        if len(prompt) + max(len(chosen), len(rejected)) > max_tokens:
            long += 1
            continue
        length = len(prompt) + max(len(chosen), len(rejected))
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "length": length}
        rows.append({"images": list(pair.prompt.images), **row})
    return rows, long


def train_preference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[PreferenceExample],
    loss: PreferenceLoss,
    budget: Budget,
    folder: str | Path,
    seed: int,
    images: ImageSource | str | Path = "data",
    report: Report | None = None,
) -> dict[str, float]:
    """Train `model` in place against the frozen `reference`; returns numbers of the run.

    Raises TrainingError where there are no pairs, and for a run that trained nothing.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    encoder = Encoder(processor, images)
    rows, too_long = encode_pairs(encoder, pairs, budget.max_tokens)
    if not rows:
        raise TrainingError(
            f"no preference pairs to train on ({len(pairs)} given, {too_long} too long): sample more "
            "questions or paths, raise the temperature, or choose another pair rule"
        )
    if not budget.train_vision:
        freeze_vision(model)
    model.config.use_cache = False
    guard = Guard(model)
    trainer = bucketed(DPOTrainer)(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **arguments(budget, Path(folder), seed, len(rows)),
            loss_type=loss.types,
            loss_weights=loss.weights,
            beta=loss.beta,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        data_collator=PreferenceCollator(encoder),
        callbacks=[callback(guard, report)],
        optimizers=(optimizer(model, budget), None),
    )
    numbers = run_trainer(trainer, guard, folder) | {"pairs": len(rows), "too_long": too_long}
    last: dict[str, Any] = next(
        (entry for entry in reversed(trainer.state.log_history) if "rewards/margins" in entry), {}
    )
    return numbers | {name: last[key] for name, key in _LAST.items() if key in last}


_LAST = {
    "implicit_reward_margin": "rewards/margins",
    "implicit_reward_accuracy": "rewards/accuracies",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
}
