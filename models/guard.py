"""What every training run passes through: a run that trained nothing fails.

    guard = Guard(model)
    trainer.add_callback(callback(guard, report))
    ...
    guard.finish(model, steps)

No step taken, a loss or gradient that is not finite, gradients of zero, or a weight meant to train that did
not move: each is a TrainingError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.distributed import gathered
from models.stop_rules import Sign, StopRules, divergence

if TYPE_CHECKING:
    import torch

Report = Callable[[dict[str, float], int, int], None]
"""report(numbers, step, steps): called at every logging step."""


class TrainingError(RuntimeError):
    """A training run that must not be taken for a finished one; the message says what to do."""


class Guard:
    """Watches one run: finite loss and gradients at every log, and every trained tensor moved in the end."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.before = {n: _digest(p) for n, p in model.named_parameters() if p.requires_grad}
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
        if steps == 0:
            raise TrainingError("no training step was taken: the data set is empty or already trained on")
        if self.norms and max(self.norms) == 0:
            raise TrainingError(
                "all gradients were zero: no token carried a loss (were completions cut off?)"
            )
        still, broken = [], []
        for name, parameter in model.named_parameters():
            with gathered(parameter) as weight:
                if not bool(weight.isfinite().all()):
                    broken.append(name)
                elif self.before.get(name) == _digest(weight):
                    still.append(name)
        if still and len(still) == len(self.before):
            raise TrainingError("no weight moved: is the learning rate zero?")
        if broken:
            raise TrainingError(f"{broken[0]} is not finite: lower the learning rate, or check the data")
        if untouched := [name for name in still if not _may_rest(name, steps)]:
            raise TrainingError(
                f"{len(untouched)} trained tensors did not move, e.g. {untouched[0]}: "
                "freeze them or fix the data"
            )


def _digest(weight: torch.Tensor) -> bytes:
    """Of a tensor's bytes: a copy of what is to be trained would take as much memory as the model."""
    import torch

    data = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


def _may_rest(name: str, steps: int) -> bool:
    """The first step of a warm-up has rate 0, and a factor of LoRA no gradient while the other is zero."""
    return name.endswith("bias") or (".lora_A." in name and steps < 3)


class Diverged(TrainingError):
    """A run that a stop rule has ended; the message says where its last good checkpoint lies."""


def callback(guard: Guard, report: Report | None, stop: StopRules | None = None, beta: float = 1.0) -> Any:
    """A transformers callback that feeds the guard and the report, and obeys the rules: no checkpoint while
    one is broken, Diverged once it strikes."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
            guard.log(numbers, state.global_step)
            if "loss" not in numbers:
                return
            if report:
                report(numbers, state.global_step, state.max_steps)
            if stop and (sign := divergence(state.log_history, stop, beta)):
                control.should_save = False
                if sign.logs >= stop.patience:
                    raise Diverged(_told(sign, state.global_step, args.output_dir))

    return Watch()


def _told(sign: Sign, step: int, folder: str) -> str:
    found = max(
        Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None
    )
    good = (
        f"The last checkpoint from before is kept: {found}"
        if found
        else "No checkpoint was written before: the model that this run began from is the last good one"
    )
    return (
        f"the run has diverged: {sign.seen}, at step {step}, since step {sign.since}. {good}. "
        f"Try this: {sign.advice}; or change the rule (`stop` of the budget) if the run is sound"
    )
