"""Supervised fine-tuning with TRL, on conversations encoded once.

from models.sft import train_sft
report = train_sft(model, processor, conversations, Budget(epochs=2), folder=".work/sft", seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.batches import PartedCollator, bucketed, padded_tokens, parted
from models.encoded import encoded
from models.families import token_types
from models.frozen_vision import frozen_vision, numbered_images
from models.guard import Guard, Report, TrainingError, callback
from models.images import ImageSource
from models.training import Budget, arguments, freeze_vision, optimizer, possible, quiet, run_trainer
from models.vlm import IGNORE, Conversation, Encoder, pad
from models.watch import Counts, Work, sft_counts, watched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin


def encode_rows(
    encoder: Encoder, conversations: Sequence[Conversation], max_tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows {"images", "input_ids", "labels", "length", "trained"}, the last the number of tokens with a loss,
    and how many conversations were too long and left out."""
    rows, long = [], 0
    first = next((c.images for c in conversations if c.images), None)
    if first:
        encoder.prepare(first)
    for conversation in conversations:
        ids, labels = encoder.encode(conversation)
        if len(ids) > max_tokens:
            long += 1
            continue
        counts = {"length": len(ids), "trained": sum(label != IGNORE for label in labels)}
        rows.append({"images": list(conversation.images), "input_ids": ids, "labels": labels, **counts})
    return rows, long


class SftCollator:
    """Rows of `encode_rows` to a padded batch."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels [rows, longest], and the image tensors.

        The mask is all ones: padding stands on the right, where no token looks, and has no label. Without a
        mask to apply attention takes its faster path.
        """
        import torch

        tokenizer = self.encoder.tokenizer
        input_ids = pad([row["input_ids"] for row in rows], tokenizer.pad_token_id, left=False)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": pad([row["labels"] for row in rows], IGNORE, left=False),
            **token_types(self.encoder.processor, input_ids),
            **numbered_images(self.encoder, [row["images"] for row in rows]),
        }


def row_length(row: dict[str, Any]) -> int:
    """Tokens of a row."""
    return int(row["length"])


def train_sft(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    budget: Budget,
    folder: str | Path,
    seed: int,
    images: ImageSource | str | Path | Encoder = "data",
    report: Report | None = None,
) -> dict[str, float]:
    """Train in place on the assistant texts; returns numbers of the run.
    folder: encoded rows, and trainer checkpoints, for resuming. images: as `Encoder` takes them, or an
    encoder of the same processor that has met them before.

    Raises TrainingError for an empty set and for a run that trained nothing.
    """
    quiet()
    from trl import SFTConfig, SFTTrainer

    budget = possible(budget)
    encoder = images if isinstance(images, Encoder) else Encoder(processor, images)
    rows, too_long = encoded(encode_rows, encoder, conversations, budget.max_tokens, folder)
    if not len(rows):
        raise TrainingError(
            f"nothing to train on: {len(conversations)} conversations, "
            f"{too_long} longer than {budget.max_tokens}"
        )
    if not budget.train_vision:
        freeze_vision(model)
    model.config.use_cache = False
    guard = Guard(model)
    collate: Any = SftCollator(encoder)
    if budget.batch_tokens:  # the rows of a step are collated at once
        step = replace(budget, batch_size=budget.batch_size * budget.accumulate, accumulate=1)
        collate = PartedCollator(collate, row_length, padded_tokens, budget.batch_tokens)
        kind = parted(SFTTrainer)
    else:
        step = budget
        kind = bucketed(SFTTrainer, sum(rows["trained"]) / len(rows))
    counts = Counts(Work.of(model), sft_counts)
    with frozen_vision(model, budget.vision_cache_mb << 20):
        trainer = watched(kind, counts)(
            model=model,
            args=SFTConfig(
                **arguments(step, Path(folder), seed, len(rows)),
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=rows,
            processing_class=processor,
            data_collator=counts.counted(collate),
            callbacks=[callback(guard, report, budget.stop)],
            optimizers=(optimizer(model, budget), None),
        )
        numbers = run_trainer(trainer, guard, folder)
    return numbers | {"examples": len(rows), "too_long": too_long}
