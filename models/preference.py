"""Preference training with TRL (METHOD 1.4, 3): MPO by default, plain DPO and its relatives by parameter.

from models.preference import PreferenceLoss, train_preference
budget = Budget(learning_rate=5e-7)
train_preference(model, reference, processor, pairs, PreferenceLoss(), budget, ".work/dpo", seed=0)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.batches import PartedCollator, bucketed
from models.encoded import encoded
from models.frozen_vision import frozen_vision
from models.guard import Guard, Report, TrainingError, callback
from models.images import ImageSource
from models.pairs import PreferenceCollator, PreferenceExample, SharedCollator, encode_pairs
from models.preference_trainer import companion, pair_size, shared_tokens
from models.shared_prompt import difference, obstacle, shared_prompt
from models.training import Budget, arguments, freeze_vision, optimizer, possible, quiet, run_trainer
from models.vlm import Encoder
from models.watch import Counts, Work, pair_counts, watched

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

TOLERANCE, TOLERANCE_HALF = 1e-3, 0.2
"""Most that a token's log-probability may differ by with a shared prompt: in float32, in 16 bits."""


@dataclass(frozen=True)
class PreferenceLoss:
    """TRL's loss names with weights. Default: MPO, 0.8 DPO + 0.2 BCO + 1.0 NLL of the chosen
    (arXiv 2411.10442, eq. 2)."""

    types: list[str] = field(default_factory=lambda: ["sigmoid", "bco_pair", "sft"])
    weights: list[float] = field(default_factory=lambda: [0.8, 0.2, 1.0])
    beta: float = 0.1


def train_preference(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    processor: ProcessorMixin,
    pairs: Sequence[PreferenceExample],
    loss: PreferenceLoss,
    budget: Budget,
    folder: str | Path,
    seed: int,
    images: ImageSource | str | Path | Encoder = "data",
    report: Report | None = None,
    share_prompts: bool = True,
) -> dict[str, float]:
    """Train `model` in place against the frozen `reference`; returns numbers of the run.

    reference: None for the model as it is given, which needs no second copy of it. It runs before the first
    step, and is not kept after that. share_prompts: one forward pass over a prompt and both completions,
    where the model can (models.shared_prompt). images: as `Encoder` takes them, or an encoder of the same
    processor.

    Raises TrainingError where there are no pairs, and for a run that trained nothing.
    """
    quiet()
    encoder = images if isinstance(images, Encoder) else Encoder(processor, images)
    budget = possible(budget)
    rows, too_long = encoded(encode_pairs, encoder, pairs, budget.max_tokens, folder)
    if not len(rows):
        raise TrainingError(
            f"no preference pairs to train on ({len(pairs)} given, {too_long} too long): sample more "
            "questions or paths, raise the temperature, or choose another pair rule"
        )
    if not budget.train_vision:
        freeze_vision(model)
    model.config.use_cache = False
    guard = Guard(model)
    with ExitStack() as stack:
        stack.enter_context(frozen_vision(model, budget.vision_cache_mb << 20))
        shared = share_prompts and _shares(stack, model, encoder, rows)
        with ExitStack() as once:
            if reference is not None:
                once.enter_context(
                    frozen_vision(reference.requires_grad_(False), budget.vision_cache_mb << 20)
                )
                if shared:
                    once.enter_context(shared_prompt(reference))
            trainer = _trainer(model, reference, encoder, rows, loss, budget, folder, seed, shared)
        del reference
        trainer.add_callback(callback(guard, report, budget.stop, loss.beta))
        numbers = run_trainer(trainer, guard, folder)
    last: dict[str, Any] = next(
        (entry for entry in reversed(trainer.state.log_history) if "rewards/margins" in entry), {}
    )
    counts = {"pairs": len(rows), "too_long": too_long, "shared_prompt": int(shared)}
    return numbers | counts | {name: last[key] for name, key in _LAST.items() if key in last}


def _shares(stack: ExitStack, model: PreTrainedModel, encoder: Encoder, rows: Dataset) -> bool:
    """Have the model share prompts while the stack is open; False, and a warning that says why, if it cannot.

    That its configuration allows it is not enough: log-probabilities of some pairs must be those of plain
    rows.
    """
    reason = obstacle(model)
    if reason is None:
        with ExitStack() as trial:
            trial.enter_context(shared_prompt(model))
            reason = _disagreement(model, encoder, rows)
            if reason is None:
                stack.push(trial.pop_all())
                return True
    name = type(model).__name__
    logging.getLogger(__name__).warning("%s does not share prompts, each is read twice: %s", name, reason)
    return False


def _disagreement(model: PreTrainedModel, encoder: Encoder, rows: Dataset) -> str | None:
    """How log-probabilities of the shortest and the longest pair differ with a shared prompt; None if not."""
    import torch

    if torch.cuda.is_available():  # where the trainer puts it: on the CPU a large model would take minutes
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    lengths = list(rows["length"])
    some = [rows[lengths.index(of(lengths))] for of in (min, max)]
    plain, shared = PreferenceCollator(encoder)(some), SharedCollator(encoder)(some)
    try:
        found = difference(model, plain, shared)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"its forward pass fails ({type(error).__name__}: {error})"
    allowed = TOLERANCE if model.dtype == torch.float32 else TOLERANCE_HALF
    return None if found <= allowed else f"its log-probabilities differ by {found:.2g}"


def _trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    encoder: Encoder,
    rows: Dataset,
    loss: PreferenceLoss,
    budget: Budget,
    folder: str | Path,
    seed: int,
    shared: bool,
) -> Any:
    """The trainer; when it is made the reference has run."""
    from trl import DPOConfig, DPOTrainer

    collate = (SharedCollator if shared else PreferenceCollator)(encoder)
    tokens = budget.batch_tokens
    counts = Counts(Work.of(model), pair_counts, "pairs")
    batches = PartedCollator(collate, pair_size, shared_tokens, tokens) if tokens else collate
    return watched(companion(bucketed(DPOTrainer), collate, folder, tokens), counts)(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **arguments(budget, Path(folder), seed, len(rows)),
            loss_type=loss.types,
            loss_weights=loss.weights,
            beta=loss.beta,
            precompute_ref_log_probs=True,
        ),
        train_dataset=rows,
        processing_class=encoder.processor,
        data_collator=counts.counted(batches),
        optimizers=(optimizer(model, budget), None),
    )


_LAST = {
    "implicit_reward_margin": "rewards/margins",
    "implicit_reward_accuracy": "rewards/accuracies",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
}
