"""Training on 10³ to 10⁵ rows: is the cost of a pair flat, and of a conversation?

    python -m benchmarks.training_scale [--save]
    python -m benchmarks.training_scale --rows 1000 2000 10000
    python -m benchmarks.training_scale --one preference --rows 10000      # in this process; prints JSON

The smallest model that can be built, so that what surrounds it is seen: pairs or conversations are encoded,
the reference runs, one epoch is trained with a batch of 64, as the stages do it. Pictures are of a thousand
kinds. Seconds count from the call of the trainer to its return, start included; each size is a process of its
own. Another row's time, from one size to the next, has no start in it. Memory is the largest resident size.
Waiting is the share of all seconds in which the trainer waits for rows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

from benchmarks import results
from benchmarks.results import Row, Table
from benchmarks.trainers import embedded, fetches, in_a_process, peak_bytes

ROWS = (1_000, 10_000, 100_000)
KINDS = {"preference": "pair", "sft": "conversation"}
BATCH = 64
PICTURES = 1_000
RATIO = 1.2
"""Target: of the time a row, between the fewest and the most."""
MODULE = "benchmarks.training_scale"


def one(kind: str, count: int) -> dict[str, Any]:
    """Train on so many rows in this process: seconds, share of waiting, bytes before and at most."""
    from models.pairs import PreferenceExample
    from models.preference import PreferenceLoss, train_preference
    from models.sft import train_sft
    from models.training import Budget
    from models.vlm import Conversation, Encoder

    import_module("trl.trainer.dpo_trainer"), import_module("trl.trainer.sft_trainer")
    model, processor, pictures = embedded(hidden=32, layers=1, intermediate=32, vision_layers=1)
    encoder = Encoder(processor, pictures)
    chance = random.Random(0)
    budget = Budget(batch_size=BATCH, learning_rate=1e-3, save_steps=count)

    def text(words: int) -> str:
        return "".join(f" {chance.randrange(100)}" for _ in range(words))

    def asked() -> tuple[list[str], str]:
        return [str(chance.randrange(PICTURES))], text(24)

    rows: list[Any] = []
    for _ in range(count):
        images, question = asked()
        if kind == "sft":
            rows.append(Conversation(images, [(question, text(24))]))
        else:
            rows.append(PreferenceExample(Conversation(images, [(question, "")]), text(16), text(16)))
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as folder, fetches(encoder.tokenizer.pad_token_id) as fetched:
        began = time.perf_counter()
        if kind == "sft":
            train_sft(model, processor, rows, budget, folder, 0, encoder)
        else:
            train_preference(model, None, processor, rows, PreferenceLoss(), budget, folder, 0, encoder)
        seconds = time.perf_counter() - began
    waited = sum(fetched.seconds)
    return {"seconds": seconds, "waited": waited, "before": before, "peak": peak_bytes()}


def judge(found: dict[str, dict[int, dict[str, Any]]]) -> tuple[list[Row], Table]:
    """Rows, and the table."""
    rows: list[Row] = []
    cells: list[list[str]] = []
    for kind, runs in found.items():
        row, sizes = KINDS[kind], sorted(runs)
        each = {count: run["seconds"] / count for count, run in runs.items()}
        another = [
            (runs[more]["seconds"] - runs[fewer]["seconds"]) / (more - fewer)
            for fewer, more in pairwise(sizes)
        ]
        whole, last = each[sizes[-1]] / each[sizes[0]], another[-1] / another[0]
        grown = (runs[sizes[-1]]["peak"] - runs[sizes[-2]]["peak"]) / (sizes[-1] - sizes[-2])
        told = f"{kind}: time a {row}, {sizes[-1]:,} / {sizes[0]:,}"
        rows += [
            Row(told, whole, "×", f"≤ {RATIO:g}", whole <= RATIO),
            Row(
                f"{kind}: time another {row}, the last / the first", last, "×", f"≤ {RATIO:g}", last <= RATIO
            ),
            Row(f"{kind}: memory another {row}", grown / 1024, "KiB"),
        ]
        cells += [
            [kind, f"{count:,}", f"{run['seconds']:.1f}", f"{each[count] * 1e3:.2f}",
             f"{run['waited'] / run['seconds']:.1%}", f"{run['peak'] / 2**20:.0f}"]
            for count, run in sorted(runs.items())
        ]  # fmt: skip
    head = ("Training", "Rows", "Seconds", "Milliseconds a row", "Waiting for data", "Peak MiB")
    return rows, Table("Training by the number of rows", head, cells, "A model of one layer.")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--one", choices=KINDS, help="train in this process; prints JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if not args.one and len(set(args.rows)) < 3:
        parser.error("--rows: three sizes or more, to compare")
    return args


def main() -> int:
    """Train with each number of rows, and compare."""
    args = arguments()
    if args.one:
        print(json.dumps(one(args.one, args.rows[0])))
        return 0
    found: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for count in sorted(set(args.rows)):
            found[kind][count] = run = in_a_process(MODULE, "--one", kind, "--rows", str(count))
            print(f"{kind}, {count:,} rows: {run['seconds']:.1f} s", flush=True)
    rows, table = judge(found)
    return results.finish(
        "training_scale", rows, [results.row_table("training_scale", rows), table], args.save
    )


if __name__ == "__main__":
    sys.exit(main())
