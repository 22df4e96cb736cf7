"""What supervised and preference training share: the budget, the arguments of TRL's trainers, and running one
so that a killed run goes on from its last checkpoint.

    trainer = SFTTrainer(model, SFTConfig(**arguments(budget, folder, seed, examples)), ...)
    numbers = run_trainer(trainer, guard, folder)
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models import vlm
from models.distributed import compile_nothing, first, form, processes, whole, zero_stage
from models.families import FamilyError, of_model
from models.folders import drop
from models.guard import Guard, TrainingError
from models.stop_rules import StopRules

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Budget:
    """How long and how hard to train. A step takes batch_size × accumulate rows, whatever the number of
    processes: they divide them. Rates are peaks; `schedule` is transformers' name; `optimizer` muon is for
    models trained from scratch (models.muon).

    batch_tokens: most tokens in one forward pass, padding counted. The rows of a step are then random, as TRL
    draws them, and run in parts of like length; in preference training a batch is, where the NLL is a mean
    over the tokens of a part. 0: batches of like length, as many rows in each (models.batches).
    vision_cache_mb: features of a frozen vision tower that are kept (models.frozen_vision).
    """

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
    batch_tokens: int = 0
    vision_cache_mb: int = 512
    save_steps: int = 200
    bf16: bool = False
    gradient_checkpointing: bool = False
    train_vision: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    stop: StopRules | None = field(default_factory=StopRules)


def quiet() -> None:
    """Before TRL is imported: no word of DeepSpeed that there is no GPU, none of bitsandbytes that a hub has
    something faster for weights in 4 bits, which nothing here downloads."""
    vlm.quiet()
    if not _has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def divided(budget: Budget, count: int) -> Budget:
    """The budget of each of `count` processes, for the same steps. TrainingError where its rows do not
    divide."""
    for name, rest in (("accumulate", budget.accumulate % count), ("batch_size", budget.batch_size % count)):
        if not rest:
            return replace(budget, **{name: getattr(budget, name) // count})
    raise TrainingError(
        f"{count} processes cannot share the {budget.batch_size} × {budget.accumulate} rows of a step: make "
        f"`accumulate` or `batch_size` of the budget a multiple of {count}"
    )


def possible(budget: Budget) -> Budget:
    """What several processes can do of it. All make the same forward passes where ZeRO-3 gathers weights for
    each, and the same backward passes: none may leave out an image that it has met, or have more parts."""
    if processes() > 1 and budget.batch_tokens:
        logging.getLogger(__name__).warning("batch_tokens of the budget is for one process: set aside")
        budget = replace(budget, batch_tokens=0)
    return replace(budget, vision_cache_mb=0) if zero_stage() == 3 else budget


def arguments(budget: Budget, folder: Path, seed: int, examples: int) -> dict[str, Any]:
    """The arguments TRL's configs share, for one of the processes that train together; final weights are
    saved by the stage, not by the trainer."""
    compile_nothing()
    budget, rows = divided(budget, processes()), budget.batch_size * budget.accumulate
    steps = budget.max_steps if budget.max_steps > 0 else math.ceil(examples * budget.epochs / rows)
    log_every = max(1, steps // 50)
    return {
        "output_dir": str(folder / form()),
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


def optimizer(model: PreTrainedModel, budget: Budget) -> torch.optim.Optimizer | None:
    """The optimizer the budget names; None leaves AdamW to the trainer."""
    if budget.optimizer == "adamw":
        return None
    from models.muon import Muon

    return Muon(model, budget.learning_rate, budget.weight_decay)


def run_trainer(trainer: Any, guard: Guard, folder: str | Path) -> dict[str, float]:
    """Train, from the last checkpoint of these processes in `folder` if there is one, under the guard; then
    tidy up."""
    from transformers import ProgressCallback

    trainer.remove_callback(ProgressCallback)
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    folder = Path(folder)
    last = last_checkpoint(folder / form())
    outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    guard.finish(model, trainer.state.global_step)
    whole(trainer)
    model.config.use_cache = True
    for parameter in () if hasattr(model, "peft_config") else model.parameters():
        parameter.requires_grad_(True)
    trainer.accelerator.wait_for_everyone()  # some may still write theirs of the last checkpoint
    if folder.exists() and first():
        drop(folder)  # half of a checkpoint would be taken for one
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = losses[-5:]
    return {
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else outcome.training_loss,
        "last_loss": sum(tail) / len(tail) if tail else outcome.training_loss,
    }


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a trainer's folder; those that a kill cut off are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process may be at it, too
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether it has what the first process writes last, and what every process does."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return len(list(checkpoint.glob("rng_state*.pth"))) == processes()
