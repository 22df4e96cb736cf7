"""What every training stage shows and records: a progress meter, and its numbers in MLflow.

with training_report(stage, "reasoning_sft") as report: train_sft(..., report=report)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tasks.meter import meter
from tasks.stage import StageRun

KEPT = (
    "loss",
    "grad_norm",
    "learning_rate",
    "mean_token_accuracy",
    "rewards/margins",
    "rewards/accuracies",
    "pairs_per_second",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
)


@contextmanager
def training_report(stage: StageRun, name: str) -> Iterator[Callable[[dict[str, float], int, int], None]]:
    """A `report` for models.guard: `name` opens the metric names."""
    with _lazy_meter(name) as advance:

        def report(numbers: dict[str, float], step: int, steps: int) -> None:
            if stage.first:
                advance(step, steps)
            stage.log_metrics({f"{name}/{key}": numbers[key] for key in KEPT if key in numbers}, step=step)

        yield report


@contextmanager
def _lazy_meter(name: str) -> Iterator[Callable[[int, int], None]]:
    """A meter that learns its total with the first report."""
    with ExitStack() as stack:
        show = None

        def advance(step: int, steps: int) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(meter(f"steps of {name}", steps))
            show(step, step)

        yield advance
