"""Supervised fine-tuning of a vision-language model against plain TRL: the same rows of every step and the
same losses, on a set of mixed lengths.

    python -m benchmarks.sft [--save]
    python -m benchmarks.sft --cases llava-next-1b qwen2.5-vl-2b --save      # on a GPU
    python -m benchmarks.sft --steps 8 --repeats 1                           # quick

Conversations have a log-normal number of tokens, as chains and captions in one set have; every second one
has a picture, of so many that each is met about four times. Plain is TRL's SFTTrainer on rows that are
encoded before, which pads the rows of a step to the longest. Ours is models.sft with `batch_tokens`, as the
stages run it: the rows of a step in parts of like length, features of the frozen tower kept. TRL by length is
TRL's own way to less padding, `group_by_length`: whole steps of like length, so that its losses are of other
rows.

Speed is tokens that are no padding a second, between two steps, after those that warm up. Waiting is the
share of that time in which the trainer waits for rows. Memory is the largest resident size of the process, or
on a GPU of what is allocated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import Row, Table
from benchmarks.trainers import build, fetches, in_a_process, peak_bytes

TARGET = 1.5
ROWS, WARM_UP, COMPARED = 16, 4, 20
"""Rows a step, steps that are not timed, losses that are compared."""
CLOSE = 1e-4
RATE = 5e-4
MET = 4
"""How often a picture is met."""
WAIT = 0.05
"""Target: the share of a step in which it waits for data."""
PLAIN, BY_LENGTH, OURS = SIDES = ("plain TRL", "TRL by length", "parts")


@dataclass(frozen=True)
class Case:
    """median, longest: text tokens of a conversation; part: tokens of a part, `batch_tokens`; accumulate: of
    TRL's steps. shape: of benchmarks.shapes, in bfloat16; None for the embedded model in float32."""

    median: int
    longest: int
    part: int
    accumulate: int = 1
    shape: str | None = None


CASES = {
    "embedded": Case(100, 900, 512),
    "llava-next-1b": Case(400, 3000, 16384, 4, "llava-next-1b"),
    "llava-next-8b": Case(400, 3000, 8192, 4, "llava-next-8b"),
    "qwen2.5-vl-2b": Case(400, 3000, 16384, 4, "qwen2.5-vl-2b"),
    "qwen2.5-vl-7b": Case(400, 3000, 8192, 4, "qwen2.5-vl-7b"),
}


def make(case: Case, steps: int) -> tuple[Any, Any, list[Any]]:
    """Model, encoder and conversations; the same in every process."""
    import numpy as np

    from models.vlm import Conversation, Encoder

    model, processor, pictures = build(case.shape)
    encoder = Encoder(processor, pictures)
    chance = random.Random(0)
    count = steps * ROWS
    lengths = np.random.default_rng(0).lognormal(np.log(case.median), 0.9, count).clip(16, case.longest)

    def text(words: int) -> str:
        return "".join(f" {chance.randrange(100)}" for _ in range(max(1, words)))

    conversations = []
    for number, length in enumerate(map(int, lengths)):
        asked = max(4, int(length * chance.uniform(0.2, 0.7)))
        images = [str(chance.randrange(count // 2 // MET + 1))] if number % 2 else []
        conversations.append(Conversation(images, [(text(asked), text(length - asked))]))
    return model, encoder, conversations


def plain(
    model: Any, encoder: Any, conversations: Any, budget: Any, folder: str, report: Any, strategy: str
) -> None:
    """What `train_sft` does, with TRL's own trainer, order and padding."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from models.guard import Guard, callback
    from models.sft import SftCollator, encode_rows
    from models.training import arguments, freeze_vision, run_trainer

    class Collator(SftCollator):
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = super().__call__(rows)
            batch.pop("image_ids", None)
            lengths = torch.tensor([[row["length"]] for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths).long()
            return batch

    rows, _ = encode_rows(encoder, conversations, budget.max_tokens)
    freeze_vision(model)
    model.config.use_cache = False
    guard = Guard(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(budget, Path(folder), 0, len(rows)),
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy=strategy,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=encoder.processor,
        data_collator=Collator(encoder),
        callbacks=[callback(guard, report)],
    )
    run_trainer(trainer, guard, folder)


def one(side: str, case: Case, steps: int) -> dict[str, Any]:
    """One run in this process: losses by step, tokens a second, shares of waiting and padding, seconds,
    bytes."""
    from models.sft import train_sft
    from models.training import Budget

    import_module("trl.trainer.sft_trainer")  # the seconds of a run begin when all is imported
    model, encoder, conversations = make(case, steps)
    budget = Budget(
        batch_size=ROWS // (case.accumulate if side != OURS else 1),
        accumulate=case.accumulate if side != OURS else 1,
        learning_rate=RATE if case.shape is None else RATE / 100,
        save_steps=10 * steps,
        batch_tokens=case.part if side == OURS else 0,
        gradient_checkpointing=case.shape is not None,
    )
    times: list[float] = []
    losses: list[float] = []

    def report(numbers: dict[str, float], step: int, total: int) -> None:
        times.append(time.perf_counter())
        losses.append(numbers["loss"])

    with tempfile.TemporaryDirectory() as folder, fetches(encoder.tokenizer.pad_token_id) as fetched:
        began = time.perf_counter()
        if side == OURS:
            train_sft(model, encoder.processor, conversations, budget, folder, 0, encoder, report)
        else:
            strategy = "random" if side == PLAIN else "group_by_length"
            plain(model, encoder, conversations, budget, folder, report, strategy)
    timed, seconds = slice(WARM_UP, steps), times[-1] - times[WARM_UP - 1]
    return {
        "tokens_per_second": sum(fetched.tokens[timed]) / seconds,
        "waiting": sum(fetched.seconds[timed]) / seconds,
        "padding": 1 - sum(fetched.tokens) / sum(fetched.padded),
        "tokens": sum(fetched.tokens),
        "seconds": time.perf_counter() - began,
        "losses": losses,
        "peak_bytes": peak_bytes(),
    }


def judge(found: dict[str, dict[str, list[dict[str, Any]]]]) -> tuple[list[Row], Table]:
    """Rows, and the table."""
    rows: list[Row] = []
    cells: list[list[str]] = []
    for case, runs in found.items():
        figures = ("tokens_per_second", "waiting", "padding", "seconds", "peak_bytes")
        middle = {
            side: {key: statistics.median(run[key] for run in of) for key in figures}
            for side, of in runs.items()
        }
        ours, base = middle[OURS], middle[PLAIN]
        losses = [run["losses"][:COMPARED] for run in (*runs[PLAIN], *runs[OURS])]
        apart = max(abs(a - b) for other in losses for a, b in zip(losses[0], other, strict=True))
        speed = ours["tokens_per_second"] / base["tokens_per_second"]
        memory = ours["peak_bytes"] / base["peak_bytes"]
        same = f"{case}: the first {len(losses[0])} losses, largest difference"
        rows += [
            Row(f"{case}: tokens a second, ours / plain", speed, "×", f"≥ {TARGET:g}", speed >= TARGET),
            Row(same, apart, "", f"≤ {CLOSE:g}", apart <= CLOSE) if CASES[case].shape is None
            else Row(same, apart, ""),  # bfloat16: rounding
            Row(f"{case}: share of a step that waits for data", ours["waiting"], "", f"≤ {WAIT:g}",
                ours["waiting"] <= WAIT),
            Row(f"{case}: peak memory, ours / plain", memory, "×", "≤ 1", memory <= 1),
        ]  # fmt: skip
        if BY_LENGTH in middle:
            rate = ours["tokens_per_second"] / middle[BY_LENGTH]["tokens_per_second"]
            rows.append(Row(f"{case}: tokens a second, ours / {BY_LENGTH}", rate, "×"))
        cells += [
            [case, side, f"{of['tokens_per_second']:.0f}", f"{of['padding']:.0%}", f"{of['waiting']:.1%}",
             f"{of['seconds']:.1f}", f"{of['peak_bytes'] / 2**20:.0f}"]
            for side, of in middle.items()
        ]  # fmt: skip
    head = ("Case", "Trainer", "Tokens a second", "Padding", "Waiting", "Seconds of a run", "Peak MiB")
    return rows, Table("Supervised fine-tuning", head, cells, f"{ROWS} rows a step, medians.")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["embedded"])
    parser.add_argument("--steps", type=int, default=2 * COMPARED)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if not {PLAIN, OURS} <= set(args.sides):
        parser.error(f"--sides: {PLAIN!r} and {OURS!r} are always compared")
    if args.steps <= WARM_UP:
        parser.error(f"--steps: more than {WARM_UP}, which warm up")
    return args


def main() -> int:
    """Run the trainers in every case, in turns, and compare."""
    args = arguments()
    if args.one:
        print(json.dumps(one(args.one, CASES[args.cases[0]], args.steps)))
        return 0
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case in args.cases:
        runs = found.setdefault(case, {side: [] for side in args.sides})
        for _ in range(args.repeats):
            for side in args.sides:
                words = ("--one", side, "--cases", case, "--steps", str(args.steps))
                run = in_a_process("benchmarks.sft", *words)
                print(f"{case} {side}: {run['tokens_per_second']:.0f} tokens a second", flush=True)
                runs[side].append(run)
    rows, table = judge(found)
    return results.finish("sft", rows, [results.row_table("sft", rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
