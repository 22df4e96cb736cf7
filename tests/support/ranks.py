"""One of the processes that train together, on a tiny model: what tests/stages/test_distributed.py starts.

    accelerate launch --config_file hardware/2cpu-zero3.yaml -m tests.support.ranks FOLDER dpo

FOLDER/KIND gets steps/ and, when done, out/ with the checkpoint and losses.json. dpo=3: killed when the third
step is logged. Two epochs of three steps, a checkpoint every two.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from models.distributed import first
from models.grpo import Grpo, train_grpo
from models.preference import PreferenceLoss, train_preference
from models.sft import train_sft
from models.training import Budget
from models.vlm import save
from tasks import launch
from tests.support.tiny_vlm import lessons, model, pairs, picture, processor

BUDGET = Budget(epochs=2, batch_size=2, accumulate=2, learning_rate=1e-3, save_steps=2)
PAIRS = pairs(12)
GRPO = Grpo(generations=2, max_new_tokens=6)


def share_of_e(indices: Sequence[int], completions: Sequence[str]) -> list[float]:
    """A reward that an untrained model gets some of."""
    return [text.count("e") / 8 for text in completions]


def train(kind: str, folder: Path, kill_at: int | None = None) -> None:
    """kind: sft; dpo, whose reference is the policy as it comes; dpo_sft, with another one; or grpo."""
    made = processor()
    policy, losses = model(made), []

    def report(numbers: dict[str, float], step: int, steps: int) -> None:
        losses.append([step, numbers["loss"]])
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "sft":
        numbers = train_sft(policy, made, lessons(), BUDGET, folder / "steps", 7, picture, report)
    elif kind == "grpo":
        questions = [pair.prompt for pair in PAIRS[:4]]
        numbers = train_grpo(
            policy, made, questions, share_of_e, GRPO, BUDGET, folder / "steps", 7, picture, report
        )
    else:
        reference = model(made, seed=1) if kind == "dpo_sft" else None
        loss = PreferenceLoss()
        numbers = train_preference(
            policy, reference, made, PAIRS, loss, BUDGET, folder / "steps", 7, picture, report
        )
    if first():
        save(policy, made, folder / "out")
        (folder / "out/losses.json").write_text(json.dumps({"losses": losses, "numbers": numbers}))


if __name__ == "__main__":
    launch.spread()  # so that it ends with its launcher, as a stage does
    kind, _, kill_at = sys.argv[2].partition("=")
    train(kind, Path(sys.argv[1]) / kind, int(kill_at) if kill_at else None)
