"""TRL's preference trainer with reference log-probabilities computed once, and batches in parts.

    trainer = companion(DPOTrainer, collate, folder, batch_tokens=0)(model=model, ref_model=reference, ...)

The losses, what is logged and their names are TRL's. Its reference runs before the first step, its
log-probabilities go through a file (models.reference), and its memory is free from then on. The arguments
must say `precompute_ref_log_probs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.batches import in_parts
from models.distributed import rank, share
from models.reference import ReferenceLog, digest

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Any]]


def pair_size(row: Row) -> tuple[int, int]:
    """Tokens of a pair's prompt, and of its longer completion."""
    return len(row["prompt"]), max(len(row["chosen"]), len(row["rejected"]))


def shared_tokens(sizes: Sequence[tuple[int, int]]) -> int:
    """Of a batch of pairs whose prompts are shared, padding counted."""
    prompt, completion = (max(size[side] for size in sizes) for side in (0, 1))
    return len(sizes) * (prompt + 2 * completion)


def companion(trainer: type, collate: Collate, folder: str | Path, batch_tokens: int = 0) -> type:
    """The trainer class, subclassed. collate: rows to a batch; folder: of the reference's log-probabilities;
    batch_tokens: most tokens in one forward pass of the reference, 0 for no limit."""

    class Companion(trainer):
        ref_model: Any
        _share = 1.0

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset  # its rows are token ids already

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            key = digest(self._precompute_model_hash, dataset, self.processing_class)
            log = ReferenceLog(folder, key, rank())
            sizes = [pair_size(row) for row in dataset]
            missing = log.missing(in_parts(sizes, shared_tokens, batch_size, batch_tokens))
            self.accelerator.wait_for_everyone()  # before any writes, so that all have found the same missing
            if missing:
                model = self._reference()

                def compute(batch: Sequence[int]) -> tuple[list[float], list[float]]:
                    inputs = self._prepare_inputs(collate([dataset[index] for index in batch]))
                    chosen, rejected = self.compute_ref_log_probs(model, inputs)
                    return chosen.tolist(), rejected.tolist()

                log.fill(share(missing), compute)
                if hasattr(model, "destroy"):
                    model.destroy()  # DeepSpeed's engine, with its hooks
                self.accelerator.wait_for_everyone()
                log.read()
            self._free_reference()
            for column, side in (("ref_chosen_logps", 0), ("ref_rejected_logps", 1)):
                dataset = dataset.add_column(column, [log.values[row][side] for row in range(len(dataset))])
            return dataset

        def _reference(self) -> Any:
            """The reference, or the policy before its first step, where it can run."""
            model = self.ref_model or self.model
            if self.ref_model is None and self.is_deepspeed_enabled:  # not placed, or split, before training
                from trl.models import prepare_deepspeed

                model = prepare_deepspeed(self.model, self.accelerator)
            model.eval()
            return model

        def _free_reference(self) -> None:
            models = self.accelerator._models
            models[:] = [model for model in models if model is not self.ref_model]
            self.ref_model = None
            if "ref" in getattr(self.model, "peft_config", {}):  # TRL's copy of an adapter as it came
                self.model.delete_adapter("ref")

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            parts = inputs.get("parts") or [inputs]
            pairs = [len(part["completion_mask"]) // 2 for part in parts]
            loss = 0.0
            for part, count in zip(parts, pairs, strict=True):
                self._share = count / sum(pairs)
                loss += super().training_step(model, part, num_items_in_batch)
            return loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * self._share

    return Companion
