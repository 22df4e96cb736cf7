"""The local engine against plain `model.generate`: the embedded profile's own chains, decoded greedily.

    python -m benchmarks.local_engine --from-artifacts . [--save]
    python -m benchmarks.local_engine --from-artifacts . --questions 16 --repeats 1      # a quick one

The generator and the questions come from a checkout in which `make demo` has got as far as `generate`, the
settings of the chains from the embedded profile: two for each question, of several steps of varying length,
each a prompt that goes on from the one before. Both engines are driven by the same code, with the same
tokens, the shortest of the waiting prompts first, at most as many in a batch as that stage has. Plain means
transformers' own generate: batches padded on the left, its KV cache on, all of a prompt computed at every
step, rows that have ended carried along to the end of their batch. For either, an image file is decoded and
scaled once. Runs take turns; each begins with an empty engine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.results import ROOT, Row, Table

if TYPE_CHECKING:
    from models.engines.base import Completion, Engine, Request
    from models.reasoning import Settings
    from models.records import Question

RATIO = 3.0
"""Target: seconds of plain generate / seconds of the local engine."""
PLAIN, LOCAL = "model.generate", "local engine"
PROFILE = ROOT / "profiles" / "embedded.yaml"
QUIET_TURNS = 8
WARM_UP = 4


@dataclass(eq=False)
class _Asked:
    """A request, its tokens, where its reply goes."""

    request: Request
    ids: list[int]
    reply: asyncio.Future[Completion]


class PlainEngine:
    """transformers' generate behind the interface of an engine; greedy."""

    independent = False

    def __init__(self, model: Any, processor: Any, images: Any, batch_size: int) -> None:
        from models.vlm import Encoder

        self.model, self.capacity = model, batch_size
        self.encoder = Encoder(processor, images)
        self._waiting: list[_Asked] = []
        self._decoding: asyncio.Task[None] | None = None

    async def ask(self, request: Request) -> Completion:
        """Engine.ask."""
        self.encoder.prepare(request.prompt.images)
        asked = _Asked(
            request, self.encoder.prompt(request.prompt), asyncio.get_running_loop().create_future()
        )
        self._waiting.append(asked)
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode_all())
        return await asked.reply

    async def close(self) -> None:
        """Engine.close."""
        if self._decoding is not None:
            self._decoding.cancel()

    async def _decode_all(self) -> None:
        """Batches of the shortest, once everybody has asked."""
        while self._waiting:
            quiet, asked = 0, len(self._waiting)
            while quiet < QUIET_TURNS:
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._waiting) == asked else 0
                asked = len(self._waiting)
            self._waiting.sort(key=lambda asked: len(asked.ids))
            batch, self._waiting = self._waiting[: self.capacity], self._waiting[self.capacity :]
            try:
                for asked, said in zip(batch, self._generate(batch), strict=True):
                    asked.reply.set_result(said)
            except Exception as error:
                for asked in batch:
                    asked.reply.set_exception(error)

    def _generate(self, batch: Sequence[_Asked]) -> list[Completion]:
        import torch

        from models.engines.base import Completion
        from models.vlm import pad, stack_pixels

        tokenizer = self.encoder.tokenizer
        tokens = pad([asked.ids for asked in batch], tokenizer.pad_token_id, left=True)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=pad([[1] * len(asked.ids) for asked in batch], 0, left=True),
                **stack_pixels(self.encoder, [asked.request.prompt.images for asked in batch]),
                do_sample=False,
                max_new_tokens=batch[0].request.sampling.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        replies = []
        for row in out[:, tokens.shape[1] :].tolist():
            finished = tokenizer.eos_token_id in row
            said = row[: row.index(tokenizer.eos_token_id)] if finished else row
            text = tokenizer.decode(said, skip_special_tokens=False)
            replies.append(Completion(text, len(said) + finished, finished))
        return replies


@dataclass(frozen=True)
class Work:
    """What a checkout samples in `generate`. samples: chains a question; rows: most in a batch."""

    questions: Sequence[Question]
    samples: int
    settings: Settings
    checkpoint: Path
    images: Path
    rows: int


def read_work(folder: Path, questions: int) -> Work:
    """The questions of a checkout, greedy. Ends the program if there is none."""
    from tasks import generate, params, roles
    from tasks.engines import EngineParams

    checkpoint = folder / roles.GENERATOR
    if not (checkpoint / "model.safetensors").is_file():
        sys.exit(f"{checkpoint} holds no generator: run `make demo` there first")
    p = params.load("generate", generate.Params, PROFILE)
    capacity = params.load("engines.generator", EngineParams, PROFILE).capacity
    with chdir(folder):
        asked = roles.training_questions("generate", questions)
    settings = replace(p.chain, temperature=0.0, repetition_penalty=1.0)
    rows = min(capacity, p.chunk * p.samples)
    return Work(asked, p.samples, settings, checkpoint, folder / "data", rows)


@dataclass(frozen=True)
class Run:
    """One run of an engine. chains: in order; steps: in all, their answers included."""

    seconds: float
    chains: Sequence[Any]

    @property
    def steps(self) -> int:
        return sum(len(chain.steps) + 1 for chain in self.chains)


def run(engine: Engine, work: Work) -> Run:
    """All chains of all questions."""
    from models.reasoning import progressive_chain
    from tasks.sampling import run_all

    began = time.perf_counter()
    chains = run_all(
        lambda asked: progressive_chain(engine, *asked, work.settings, 0),
        [(question, sample) for question in work.questions for sample in range(work.samples)],
        [engine],
        "chains",
    )
    return Run(time.perf_counter() - began, chains)


def measure(work: Work, repeats: int) -> dict[str, list[Run]]:
    """Runs by engine, taking turns after a short one of each."""
    from models.engines.local import LocalEngine
    from models.vlm import load

    model, processor = load(work.checkpoint)
    makers: dict[str, Callable[..., Any]] = {PLAIN: PlainEngine, LOCAL: LocalEngine}
    found: dict[str, list[Run]] = {name: [] for name in makers}
    for make in makers.values():
        run(make(model, processor, work.images, work.rows), replace(work, questions=work.questions[:WARM_UP]))
    for _ in range(repeats):
        for name, make in makers.items():
            one = run(make(model, processor, work.images, work.rows), work)
            print(f"{name}: {one.seconds:.2f} s", flush=True)
            found[name].append(one)
    return found


def judge(found: dict[str, list[Run]], rows: int) -> tuple[list[Row], Table]:
    """Rows, and the table."""
    plain, local = found[PLAIN], found[LOCAL]
    seconds = {name: statistics.median(one.seconds for one in runs) for name, runs in found.items()}
    ratios = sorted(a.seconds / b.seconds for a, b in zip(plain, local, strict=True))
    ratio = seconds[PLAIN] / seconds[LOCAL]
    chains, steps = len(plain[0].chains), plain[0].steps
    same = min(
        sum(a == b for a, b in zip(plain[0].chains, other.chains, strict=True)) for other in [*plain, *local]
    )
    spread = f"median of {len(plain)}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
    made = [
        Row(f"{PLAIN} / {LOCAL}, seconds ({spread})", ratio, "×", f"≥ {RATIO:g}", ratio >= RATIO),
        Row("chains the same in all runs", same, f"of {chains}", f"= {chains}", same == chains),
        *(Row(name, value, "s") for name, value in seconds.items()),
    ]
    cells = [[name, f"{value:.2f}", f"{steps / value:.0f}"] for name, value in seconds.items()]
    caption = f"{chains} chains of {steps / chains:.1f} calls, up to {rows} rows in a batch, greedy; medians."
    return made, Table("Engines", ("Engine", "Seconds", "Calls a second"), cells, caption)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from-artifacts", type=Path, required=True, metavar="DIR", help="a checkout")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args(words)


def main() -> int:
    """Run both engines and compare."""
    args = arguments()
    work = read_work(args.from_artifacts.resolve(), args.questions)
    rows, table = judge(measure(work, args.repeats), work.rows)
    return results.finish("local-engine", rows, [results.row_table("local-engine", rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
