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
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "length",
    "trained_length",
    "prompt_length",
    "chosen_length",
    "rejected_length",
    "tokens_per_second",
    "pairs_per_second",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "padding_share",
    "data_wait_share",
    "memory_gb",
    "tflops",
    "mfu",
)
SHOWN = (
    ("loss", "loss {:.3f}"),
    ("rewards/margins", "margin {:.2f}"),
    ("reward", "reward {:.2f}"),
    ("pairs_per_second", "{:,.1f} pairs/s"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("padding_share", "{:.0%} padding"),
    ("mfu", "{:.0%} MFU"),
)


@contextmanager
def training_report(stage: StageRun, name: str) -> Iterator[Callable[[dict[str, float], int, int], None]]:
    """A `report` for models.guard: `name` opens the metric names."""
    with _lazy_meter(name) as advance:

        def report(numbers: dict[str, float], step: int, steps: int) -> None:
            if stage.first:
                said = ", ".join(form.format(numbers[key]) for key, form in SHOWN if key in numbers)
                advance(step, steps, said)
            stage.log_metrics({f"{name}/{key}": numbers[key] for key in KEPT if key in numbers}, step=step)

        yield report


@contextmanager
def _lazy_meter(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """A meter that learns its total with the first report."""
    with ExitStack() as stack:
        show = None

        def advance(step: int, steps: int, said: str) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(meter(f"steps of {name}", steps))
            show(step, step, said)

        yield advance
