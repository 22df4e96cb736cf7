"""Supervised fine-tuning with TRL, on conversations encoded once;
and the guards every training run passes through.

    from models.training import Budget, train_sft
    report = train_sft(model, processor, conversations, Budget(epochs=2), folder=".work/sft", seed=0)

A run that trained nothing fails: no step taken, a loss or gradient that is not finite, gradients of zero, or
a weight meant to train that did not move. Killed, the next call continues from the last trainer checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.families import FamilyError, of_model, token_types
from models.folders import drop
from models.images import ImageSource
from models.vlm import IGNORE, Conversation, Encoder, pad, stack_pixels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

POOLED_BATCHES = 50
"""Batches' worth of random rows among which rows of like length are brought together."""

Report = Callable[[dict[str, float], int, int], None]
"""report(numbers, step, steps): called at every logging step."""


class TrainingError(RuntimeError):
    """A training run that must not be taken for a finished one; the message says what to do."""


@dataclass(frozen=True)
class Budget:
    """How long and how hard to train. Rates are peaks; `schedule` is transformers' name;
    `optimizer` muon is for models trained from scratch (models.muon)."""

    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 5e-6
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 12288
    save_steps: int = 200
    bf16: bool = False
    gradient_checkpointing: bool = False
    train_vision: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"


def arguments(budget: Budget, folder: Path, seed: int, examples: int) -> dict[str, Any]:
    """The arguments TRL's configs share; final weights are saved by the stage, not by the trainer."""
    steps = (
        budget.max_steps
        if budget.max_steps > 0
        else math.ceil(examples * budget.epochs / budget.batch_size / budget.accumulate)
    )
    log_every = max(1, steps // 50)
    return {
        "output_dir": str(folder),
        "num_train_epochs": budget.epochs,
        "max_steps": budget.max_steps,
        "per_device_train_batch_size": budget.batch_size,
        "gradient_accumulation_steps": budget.accumulate,
        "learning_rate": budget.learning_rate,
        "warmup_steps": min(
            math.ceil(budget.warmup * steps), steps - 1
        ),  # the first step of a warm-up is at rate 0
        "lr_scheduler_type": budget.schedule,
        "weight_decay": budget.weight_decay,
        "max_grad_norm": budget.max_grad_norm,
        "max_length": None,
        "bf16": budget.bf16,
        "gradient_checkpointing": budget.gradient_checkpointing,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": log_every,
        "save_steps": math.ceil(budget.save_steps / log_every)
        * log_every,  # a resumed run logs the same means
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not _has_gpu(),
    }


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def freeze_vision(model: PreTrainedModel) -> None:
    """Freeze the vision tower (METHOD 1.4); projector and language model train."""
    try:
        of_model(model).freeze_vision(model)
    except FamilyError as error:
        raise TrainingError(f"{error}, or set train_vision") from None


class Guard:
    """Watches one run: finite loss and gradients at every log, and every trained tensor moved in the end."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.before = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.norms: list[float] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Refuse a loss or gradient norm that is not finite."""
        for key in ("loss", "grad_norm"):
            if key in numbers and not math.isfinite(numbers[key]):
                raise TrainingError(
                    f"{key} is {numbers[key]} at step {step}: lower the learning rate, or check the data"
                )
        if "grad_norm" in numbers:
            self.norms.append(numbers["grad_norm"])

    def finish(self, model: torch.nn.Module, steps: int) -> None:
        """Refuse a run in which nothing, or not everything that should, has moved."""
        import torch

        if steps == 0:
            raise TrainingError("no training step was taken: the data set is empty or already trained on")
        if self.norms and max(self.norms) == 0:
            raise TrainingError(
                "all gradients were zero: no token carried a loss (were completions cut off?)"
            )
        still = [
            n
            for n, p in model.named_parameters()
            if n in self.before and torch.equal(p.detach().cpu(), self.before[n])
        ]
        if still and len(still) == len(self.before):
            raise TrainingError("no weight moved: is the learning rate zero?")
        if broken := [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
            raise TrainingError(f"{broken[0]} is not finite: lower the learning rate, or check the data")
        if untouched := [name for name in still if not _may_rest(name)]:
            raise TrainingError(
                f"{len(untouched)} trained tensors did not move, e.g. {untouched[0]}: "
                "freeze them or fix the data"
            )


def _may_rest(name: str) -> bool:
    return name.endswith("bias")


def callback(guard: Guard, report: Report | None) -> Any:
    """A transformers callback that feeds the guard and the report."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
            guard.log(numbers, state.global_step)
            if report and "loss" in numbers:
                report(numbers, state.global_step, state.max_steps)

    return Watch()


def encode_rows(
    encoder: Encoder, conversations: Sequence[Conversation], max_tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows {"images", "input_ids", "labels", "length"}, and how many conversations were too long
    and left out."""
    rows, long = [], 0
    first = next((c.images for c in conversations if c.images), None)
    if first:
        encoder.prepare(first)
    for conversation in conversations:
        ids, labels = encoder.encode(conversation)
        if len(ids) > max_tokens:
            long += 1
            continue
        images = list(conversation.images)
        rows.append({"images": images, "input_ids": ids, "labels": labels, "length": len(ids)})
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
            **stack_pixels(self.encoder, [row["images"] for row in rows]),
        }


class LengthBuckets:
    """A sampler whose consecutive batches hold rows of like length, the batches in random order:
    padding falls from about half to a few percent where lengths vary.

    The order is a function of seed and epoch alone (`set_epoch`): a resumed run meets the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths)).tolist()
        pool = POOLED_BATCHES * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        ragged = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        for index in generator.permutation(len(whole)).tolist():
            yield from whole[index]
        for batch in ragged:
            yield from batch


def bucketed(trainer: type, tokens_per_row: float | None = None) -> type:
    """The trainer class with `LengthBuckets` over the `length` column of its data set.

    tokens_per_row: mean number of tokens with a loss. Where it is given the loss of a batch is its sum over
    the expected number of tokens: a mean over the batch's own would weigh every token of the batches of short
    rows several times as much, and a model would learn to write short chains more often than its data does.
    """

    class Bucketed(trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, tokens = super().get_batch_samples(*args, **kwargs)
            if tokens_per_row is not None and tokens is not None:
                rows = sum(len(batch["input_ids"]) for batch in batches)
                ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                tokens = tokens * 0 + tokens_per_row * rows * ranks
            return batches, tokens

        def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
            rows = self.train_dataset if train_dataset is None else train_dataset
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthBuckets(rows["length"], size, self.args.data_seed)

    return Bucketed


def optimizer(model: PreTrainedModel, budget: Budget) -> torch.optim.Optimizer | None:
    """The optimizer the budget names; None leaves AdamW to the trainer."""
    if budget.optimizer == "adamw":
        return None
    from models.muon import Muon

    return Muon(model, budget.learning_rate, budget.weight_decay)


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
    folder: trainer checkpoints, for resuming. images: as `Encoder` takes them, or an encoder of the same
    processor that has met them before.

    Raises TrainingError for an empty set and for a run that trained nothing.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    encoder = images if isinstance(images, Encoder) else Encoder(processor, images)
    rows, too_long = encode_rows(encoder, conversations, budget.max_tokens)
    if not rows:
        raise TrainingError(
            f"nothing to train on: {len(conversations)} conversations, "
            f"{too_long} longer than {budget.max_tokens}"
        )
    if not budget.train_vision:
        freeze_vision(model)
    model.config.use_cache = False
    guard = Guard(model)
    tokens = sum(label != IGNORE for row in rows for label in row["labels"])
    trainer = bucketed(SFTTrainer, tokens / len(rows))(
        model=model,
        args=SFTConfig(
            **arguments(budget, Path(folder), seed, len(rows)), dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        data_collator=SftCollator(encoder),
        callbacks=[callback(guard, report)],
        optimizers=(optimizer(model, budget), None),
    )
    return run_trainer(trainer, guard, folder) | {"examples": len(rows), "too_long": too_long}


def run_trainer(trainer: Any, guard: Guard, folder: str | Path) -> dict[str, float]:
    """Train, from the last checkpoint in `folder` if there is one, under the guard; then tidy up."""
    from transformers import ProgressCallback

    trainer.remove_callback(ProgressCallback)
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    folder = Path(folder)
    last = last_checkpoint(folder)
    outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    guard.finish(model, trainer.state.global_step)
    model.config.use_cache = True
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if folder.exists():
        drop(folder)  # half of a checkpoint would be taken for one
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = losses[-5:]
    return {
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else outcome.training_loss,
        "last_loss": sum(tail) / len(tail) if tail else outcome.training_loss,
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a trainer's folder; those that a kill cut off are removed.

    The trainer writes trainer_state.json last.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
