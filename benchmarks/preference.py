"""Preference training of a vision-language model against plain TRL and ms-swift: the same pairs, order and
losses.

    python -m benchmarks.preference [--save]
    python -m benchmarks.preference --cases llava-next-1b qwen2.5-vl-2b --save       # on a GPU
    python -m benchmarks.preference --steps 8 --repeats 1 --sides "plain TRL" "shared prompt"   # quick

All train the embedded model (TinyConfig, float32) with MPO on pairs of one picture each, at a prompt once,
four and eight times as long as a completion. Plain is TRL's DPOTrainer, which reads a prompt twice and runs
its reference at every step; ours is models.preference as the stage `dpo` runs it. Every run is a process of
its own, plain and ours in turns. Speed is pairs a second between two steps, after those that warm up; the
pass of the reference before the first step is not in it, as it is none of the bound 8(P + C) / 3(P + 2C), but
it is in the seconds of whole runs, which stand beside it: one epoch, all that is built included. The bound
counts a text model's linear layers alone, a backward pass as two forward passes; what is gained beyond it
comes from attention without a mask over prompts, logits of completions alone, and images encoded once. Memory
is the largest resident size of the process.

ms-swift (benchmarks/peers/swift_peer.py) is in an environment of its own, with the TRL that it asks for: its
BCO keeps another running mean of the rewards, so that its losses are those of the others until weights have
moved, and in the third digit after that; with `sigmoid` alone they agree to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.environments import SCRIPTS, PeerError, interpreter, last_line
from benchmarks.results import Row, Table
from benchmarks.trainers import build, in_a_process, peak_bytes, picture

MODULE = "benchmarks.preference"
SHARE = 0.9
"""Target: of the bound."""
PAIRS, WARM_UP, COMPARED = 8, 4, 20
"""Pairs a step, steps that are not timed, losses that are compared."""
CLOSE = 1e-4
RATE = 5e-5
PLAIN, OURS, SWIFT = SIDES = ("plain TRL", "shared prompt", "ms-swift")
PIECES = 200
"""Words of which texts are made, to see how many tokens a word has."""


@dataclass(frozen=True)
class Case:
    """prompt and completion: tokens, which vary by an eighth; target: pairs a second, ours over plain TRL.
    shape: of benchmarks.shapes, in bfloat16; None for the embedded model in float32."""

    name: str
    prompt: int
    completion: int
    target: float | None = None
    shape: str | None = None


EMBEDDED = (
    Case("1", 160, 160, 1.6),
    Case("4", 384, 96, 2.0),
    Case("8", 512, 64, 2.15),
)
CASES = {
    case.name: case
    for case in (
        *EMBEDDED,
        *(Case(name, prompt, 512, None, name) for name, prompt in (
            ("llava-next-1b", 3200), ("llava-next-8b", 3200), ("qwen2.5-vl-2b", 1536), ("qwen2.5-vl-7b", 1536)
        )),
    )
}  # fmt: skip


def bound(prompt: float, completion: float) -> float:
    """Floating-point operations of plain TRL over those of shared prompts with a reference computed
    before."""
    return 8 * (prompt + completion) / (3 * (prompt + 2 * completion))


def make(case: Case, steps: int) -> tuple[Any, Any, list[Any]]:
    """Model, encoder and pairs; the same in every process."""
    from models.pairs import PreferenceExample
    from models.vlm import Conversation, Encoder

    chance = random.Random(case.prompt)
    model, processor, pictures = build(case.shape)
    encoder = Encoder(processor, pictures)
    encoder.prepare(["0"])
    some = "".join(f" {chance.randrange(100)}" for _ in range(PIECES))
    word = len(encoder.answer_ids(some, goes_on=True)) / PIECES
    frame = len(encoder.prompt(Conversation(["0"], [("", "")])))

    def text(tokens: int) -> str:
        tokens = round(tokens * chance.uniform(7 / 8, 9 / 8) / word)
        return "".join(f" {chance.randrange(100)}" for _ in range(tokens))

    pairs = [
        PreferenceExample(
            Conversation([str(number)], [(text(case.prompt - frame), "")]),
            text(case.completion),
            text(case.completion),
        )
        for number in range(steps * PAIRS)
    ]
    return model, encoder, pairs


def plain(model: Any, reference: Any, encoder: Any, pairs: Any, loss: Any, budget: Any, report: Any) -> None:
    """What `train_preference` does, with TRL's own trainer and forward passes."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from models.batches import bucketed
    from models.guard import Guard, callback
    from models.pairs import PreferenceCollator, encode_pairs
    from models.training import arguments, freeze_vision, run_trainer

    class Collator(PreferenceCollator):
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().__call__([{**row, "pictures": row["images"]} for row in rows])
            return {key: value for key, value in batch.items() if key != "image_ids"}

    rows, _ = encode_pairs(encoder, pairs, budget.max_tokens)
    freeze_vision(model)
    model.config.use_cache = False
    guard = Guard(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = bucketed(DPOTrainer)(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                **arguments(budget, Path(folder), 0, len(rows)),
                loss_type=loss.types,
                loss_weights=loss.weights,
                beta=loss.beta,
            ),
            train_dataset=Dataset.from_list([{**row, "images": row["pictures"]} for row in rows]),
            processing_class=encoder.processor,
            data_collator=Collator(encoder),
            callbacks=[callback(guard, report)],
        )
        run_trainer(trainer, guard, folder)


def one(side: str, case: Case, steps: int) -> dict[str, Any]:
    """One run in this process: losses and log-probabilities by step, pairs a second, seconds, bytes."""
    from models.preference import PreferenceLoss, train_preference
    from models.training import Budget

    import_module("trl.trainer.dpo_trainer")  # the seconds of a run begin when all is imported
    model, encoder, pairs = make(case, steps)
    budget = Budget(
        batch_size=1 if case.shape else PAIRS,
        accumulate=PAIRS if case.shape else 1,
        learning_rate=RATE,
        save_steps=10 * steps,
        gradient_checkpointing=case.shape is not None,
    )
    logged: list[dict[str, float]] = []
    times: list[float] = []

    def report(numbers: dict[str, float], step: int, total: int) -> None:
        times.append(time.perf_counter())
        logged.append(numbers)

    began, loss = time.perf_counter(), PreferenceLoss()
    if side == PLAIN:
        plain(model, make(case, 0)[0], encoder, pairs, loss, budget, report)
    else:
        with tempfile.TemporaryDirectory() as folder:
            train_preference(model, None, encoder.processor, pairs, loss, budget, folder, 0, encoder, report)
    return {
        "pairs_per_second": PAIRS * (len(times) - WARM_UP) / (times[-1] - times[WARM_UP - 1]),
        "seconds": time.perf_counter() - began,
        "losses": [numbers["loss"] for numbers in logged],
        "peak_bytes": peak_bytes(),
    }


def check(case: Case) -> dict[str, float]:
    """Tokens of the pairs, and the largest difference of a token's log-probability, before any training."""
    from models.pairs import PreferenceCollator, SharedCollator, encode_pairs
    from models.shared_prompt import difference, shared_prompt

    model, encoder, pairs = make(case, 1 if case.shape else 2)
    rows, _ = encode_pairs(encoder, pairs, 10_000)
    some = rows[:1] if case.shape else rows
    batches = [{k: v.to(model.device) for k, v in collate(encoder)(some).items() if k != "image_ids"}
               for collate in (PreferenceCollator, SharedCollator)]  # fmt: skip
    with shared_prompt(model):
        found = difference(model, *batches)
    sides = [len(row[side]) for row in rows for side in ("chosen", "rejected")]
    return {
        "difference": found,
        "prompt": statistics.mean(len(row["prompt"]) for row in rows),
        "completion": statistics.mean(sides),
    }


def write(case: Case, steps: int, folder: Path) -> None:
    """Model and pairs as benchmarks/peers/swift_peer.py takes them, in the order of the others."""
    from models.batches import LengthBuckets
    from models.pairs import encode_pairs
    from models.preference import PreferenceLoss
    from models.vlm import save

    model, encoder, pairs = make(case, steps)
    save(model, encoder.processor, folder / "model")
    rows, _ = encode_pairs(encoder, pairs, 10_000)
    lines = []
    for index in LengthBuckets([row["length"] for row in rows], PAIRS, seed=0):
        pair = pairs[index]
        image = folder / f"{pair.prompt.images[0]}.png"
        picture(image.stem).save(image)
        turns = {"user": f"<image>{pair.prompt.turns[0][0]}", "assistant": pair.chosen}
        messages = [{"role": role, "content": text} for role, text in turns.items()]
        lines.append({"messages": messages, "rejected_response": pair.rejected, "images": [str(image)]})
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = asdict(PreferenceLoss()) | {"batch_size": PAIRS, "learning_rate": RATE, "warm_up": WARM_UP}
    (folder / "settings.json").write_text(json.dumps(settings))


def swift(case: Case, steps: int) -> dict[str, Any]:
    """One run of ms-swift, in its own environment."""
    python = interpreter("ms-swift")
    with tempfile.TemporaryDirectory() as folder:
        write(case, steps, Path(folder))
        command = [str(python), str(SCRIPTS / "swift_peer.py"), folder]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean)
    if done.returncode:
        raise PeerError(f"ms-swift failed: {last_line(done.stderr)}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(
    cases: Sequence[Case], steps: int, repeats: int, sides: Sequence[str]
) -> dict[Case, dict[str, Any]]:
    """By case: the check under "check", and the runs of each side, in turns. ms-swift has the embedded model
    alone."""
    found: dict[Case, dict[str, Any]] = {}
    for case in cases:
        words = ["--cases", case.name, "--steps", str(steps)]
        found[case] = {
            "check": in_a_process(MODULE, "--one", "check", *words),
            **{side: [] for side in sides},
        }
        for _ in range(repeats):
            for side in sides:
                if side == SWIFT and case.shape:
                    continue
                try:
                    run = swift(case, steps) if side == SWIFT else in_a_process(MODULE, "--one", side, *words)
                except PeerError as error:
                    print(f"{case.name}: {error}", file=sys.stderr)
                    continue
                print(f"{case.name} {side}: {run['pairs_per_second']:.2f} pairs a second", flush=True)
                found[case][side].append(run)
    return found


def judge(found: dict[Case, dict[str, Any]]) -> tuple[list[Row], Table]:
    """Rows, and the table."""
    rows: list[Row] = []
    cells: list[list[str]] = []
    for case, runs in found.items():
        named, tokens = f"prompt:completion {case.name}" if not case.shape else case.name, runs["check"]
        middle = {
            side: {key: statistics.median(run[key] for run in runs[side])
                   for key in ("pairs_per_second", "seconds", "peak_bytes")}
            for side in SIDES if runs.get(side)
        }  # fmt: skip
        ours = middle[OURS]
        speeds = {side: ours["pairs_per_second"] / of["pairs_per_second"] for side, of in middle.items()}
        speed = speeds[PLAIN]
        whole = middle[PLAIN]["seconds"] / ours["seconds"]
        most = bound(tokens["prompt"], tokens["completion"])
        memory = ours["peak_bytes"] / middle[PLAIN]["peak_bytes"]
        losses = [run["losses"][:COMPARED] for run in (*runs[PLAIN], *runs[OURS])]
        apart = max(abs(a - b) for other in losses for a, b in zip(losses[0], other, strict=True))

        def within(what: str, value: float, exact: bool = case.shape is None, name: str = named) -> Row:
            """In bfloat16 the difference is rounding, and is shown."""
            said = f"{name}: {what}, largest difference"
            return Row(said, value, "", f"≤ {CLOSE:g}", value <= CLOSE) if exact else Row(said, value, "")

        said = f"{named}: pairs a second, ours / plain"
        rows += [
            Row(said, speed, "×", f"≥ {case.target:g}", speed >= case.target) if case.target
            else Row(said, speed, "×"),
            Row(f"{named}: seconds of a whole run, plain / ours", whole, "×"),
            Row(f"{named}: of the bound", speed / most, "", f"≥ {SHARE:g}", speed / most >= SHARE),
            within("log-probability of a token", tokens["difference"]),
            within(f"the first {len(losses[0])} losses", apart),
            Row(f"{named}: peak memory, ours / plain", memory, "×", "≤ 1", memory <= 1),
        ]  # fmt: skip
        if SWIFT in speeds:
            rows.append(Row(f"{named}: pairs a second, ours / ms-swift", speeds[SWIFT], "×"))
        cells += [
            [case.name, side, f"{tokens['prompt']:.0f} + {tokens['completion']:.0f}",
             f"{of['pairs_per_second']:.1f}", f"{of['seconds']:.1f}", f"{of['peak_bytes'] / 2**20:.0f}",
             f"{speed:.2f} of {most:.2f}" if side == OURS else ""]
            for side, of in middle.items()
        ]  # fmt: skip
    head = ("Case", "Trainer", "P + C", "Pairs a second", "Seconds of a run", "Peak MiB", "Ratio and bound")
    return rows, Table("Preference training", head, cells, "MPO, 8 pairs a step, medians.")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=[case.name for case in EMBEDDED],
        help="prompt:completion of the embedded model (all three), or a large shape, for a GPU",
    )
    parser.add_argument("--steps", type=int, default=COMPARED)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--one", choices=["check", PLAIN, OURS], help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if not {PLAIN, OURS} <= set(args.sides):
        parser.error(f"--sides: {PLAIN!r} and {OURS!r} are always compared")
    return args


def main() -> int:
    """Run the trainers in every case and compare."""
    args = arguments()
    cases = [CASES[name] for name in args.cases]
    if args.one:
        print(json.dumps(check(cases[0]) if args.one == "check" else one(args.one, cases[0], args.steps)))
        return 0
    rows, table = judge(measure(cases, args.steps, args.repeats, args.sides))
    return results.finish("preference", rows, [results.row_table("preference", rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
