"""Finished traces of step chains, to be played again by a model: the same prompts and texts each time.

trace = drawn(questions=24, samples=4)         # made up
trace = recorded(Path("."), questions=24)      # what `generate` sampled in a checkout
write_script(trace, processor, boards, file)   # for vLLM, which then writes the trace's texts
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from models.engines.base import Completion, Reply, Request
from models.reasoning import Settings, progressive_chain, step_json
from models.records import Question, Step
from models.vlm import Encoder

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SETTINGS = Settings("short", 1, 32, max_new_tokens=256, attempts=1, repetition_penalty=1.0)
"""Of the chains, as the embedded profile has it; more steps are allowed than any chain has."""


WORDS = (
    "row",
    "column",
    "digit",
    "sum",
    "is",
    "left",
    "right",
    "top",
    "bottom",
    "add",
    "then",
    "look",
    "again",
)
QUESTION_WORDS, STEP_WORDS, STEPS = (20, 40), (16, 64), (2, 6)
"""Least and most of what is drawn."""


@dataclass(frozen=True)
class Chain:
    """One sampled chain of a question, as it was finished."""

    question: Question
    sample: int
    steps: Sequence[Step]
    answer: str

    @property
    def said(self) -> tuple[str, ...]:
        """What tells it from others, whoever has it: chains of one question, or of questions with the same
        words, may change places."""
        return (self.question.question, *map(step_json, self.steps), self.answer)

    @property
    def texts(self) -> dict[str, str]:
        """What was said, by what the request is called (models.reasoning)."""
        begun = f"{self.question.id}/{self.sample}/"
        steps = {f"{begun}{n}.0": step_json(step) for n, step in enumerate(self.steps, 1)}
        return steps | {f"{begun}answer": self.answer}


@dataclass(frozen=True)
class Trace:
    """Chains by question and sample. boards: the questions' pictures by name, grey [height, width]."""

    chains: Sequence[Chain]
    boards: Mapping[str, Any]

    @property
    def questions(self) -> list[Question]:
        """Each once, in order."""
        return list({chain.question.id: chain.question for chain in self.chains}.values())

    @property
    def samples(self) -> int:
        return len(self.chains) // len(self.questions)

    @property
    def texts(self) -> dict[str, str]:
        return {key: text for chain in self.chains for key, text in chain.texts.items()}


def drawn(questions: int, samples: int, seed: int = 0) -> Trace:
    """Chains about boards of the embedded data's kind; their steps are one to three sentences long and of
    words that say nothing."""
    import numpy as np

    from models.boards.questions import random_digits
    from models.boards.scans import draw_board, pick_scans

    generator = np.random.default_rng([seed, questions])

    def words(least: int, most: int) -> str:
        return " ".join(generator.choice(WORDS, generator.integers(least, most + 1)))

    made, boards = [], {}
    for number in range(questions):
        name = f"{number:04d}.png"
        digits = random_digits(generator)
        boards[name] = draw_board(pick_scans(digits, "generate", generator), generator, jitter_px=1)
        question = Question(f"q{number:04d}", [name], words(*QUESTION_WORDS) + "?", "")
        for sample in range(samples):
            count = int(generator.integers(*STEPS, endpoint=True))
            steps = [Step(words(1, 3), words(*STEP_WORDS), "continue") for _ in range(count - 1)]
            steps.append(Step(words(1, 3), words(*STEP_WORDS), "final_answer"))
            made.append(Chain(question, sample, steps, words(1, 3)))
    return Trace(made, boards)


def recorded(folder: Path, questions: int) -> Trace:
    """What `generate` sampled in a checkout, of the first questions of which no chain failed. Ends the
    program if there is nothing."""
    import numpy as np
    from PIL import Image

    from models.records import read_jsonl, read_questions

    paths = folder / "artifacts/generate/paths.jsonl"
    if not paths.is_file():
        sys.exit(f"{folder} holds no chains: run `make demo` there first, at least up to `generate`")
    known = {question.id: question for question in read_questions(folder / "data/records.jsonl")}
    chains: dict[str, list[Chain]] = {}
    for row in read_jsonl(paths):
        steps = [Step(**step) for step in row["steps"]]
        chain = Chain(known[row["question_id"]], row["sample"], steps, row["answer"])
        chains.setdefault(chain.question.id, []).append(chain)
    samples = max(map(len, chains.values()))
    chosen = [of for of in chains.values() if len(of) == samples][:questions]
    boards = {}
    for (name,) in (of[0].question.images for of in chosen):
        with Image.open(folder / "data" / name) as image:
            boards[name] = np.array(image.convert("L"))
    return Trace([chain for of in chosen for chain in of], boards)


def numbered(trace: Trace, number: int, folder: Path) -> Trace:
    """The trace of run `number`, its boards written to `folder`/NUMBER as PNG files that no other run has:
    the grey of one corner is the run's number, so that nothing kept of an earlier run is of use."""
    from PIL import Image

    boards = {f"{number}/{name}": board.copy() for name, board in trace.boards.items()}
    for name, board in boards.items():
        board[0, 0] = number % 256
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(board).save(path)

    def own(question: Question) -> Question:
        return replace(question, images=[f"{number}/{name}" for name in question.images])

    return Trace([replace(chain, question=own(chain.question)) for chain in trace.chains], boards)


def calls(trace: Trace) -> list[Request]:
    """All of the finished trace, by question, sample and step."""
    told = Told(trace)

    async def run() -> None:
        for chain in trace.chains:
            await progressive_chain(told, chain.question, chain.sample, SETTINGS, 0)

    asyncio.run(run())
    return told.asked


class Told:
    """An engine without a model, which says what the trace says. asked: all calls."""

    capacity, independent = 1, True

    def __init__(self, trace: Trace) -> None:
        self.texts = trace.texts
        self.asked: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        """Engine.ask."""
        self.asked.append(request)
        return Completion(self.texts[request.key], 1, True)

    async def close(self) -> None:
        """Holds nothing."""


def write_script(trace: Trace, processor: ProcessorMixin, boards: Path, file: Path) -> None:
    """What TraceReplay (benchmarks/peers/trace_replay.py) has a model write: for every call of the trace its
    prompt and its text, as token ids."""
    encoder = Encoder(processor, boards)
    encoder.prepare(trace.questions[0].images)
    texts = trace.texts
    told = [[encoder.prompt(call.prompt), encoder.answer_ids(texts[call.key])] for call in calls(trace)]
    file.write_bytes(orjson.dumps(told))
