"""A finished trace of step chains, and an engine that plays it again: the same prompts and lengths each time.

    trace = drawn(questions=24, samples=4)         # made up
    trace = recorded(Path("."), questions=24)      # what `generate` sampled in a checkout
    plan = Plan(trace, tokenizer)
    replay = Replay(engine, plan)                  # progressive_chain(replay, ...) plays a chain

What a model writes with a call is drawn anew every time, so a call is held to its planned number of tokens,
and the chain goes on with the text of the trace.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.engines.base import Completion, Engine, Failure, Reply, Request
from models.reasoning import MAX_CONTENT, Settings, progressive_chain, step_json
from models.records import Question, Step

SETTINGS = Settings("short", min_steps=1, max_steps=32, attempts=1, repetition_penalty=1.0)
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


class Plan:
    """How many tokens each call of a trace takes. tokens: by request key."""

    def __init__(self, trace: Trace, tokenizer: Any) -> None:
        self.texts = trace.texts
        self.tokens = {
            key: len(tokenizer(text, add_special_tokens=False).input_ids) + 1
            for key, text in self.texts.items()
        }

    def held(self, request: Request) -> Request:
        """The request, which takes its planned number of tokens and cannot end before: the text that it is
        constrained to is longer than that."""
        sampling = replace(request.sampling, max_new_tokens=self.tokens[request.key])
        return replace(request, sampling=sampling, schema=endless(request.schema))


def calls(trace: Trace, plan: Plan) -> list[Request]:
    """All of the finished trace, held to the plan, by question, sample and step."""
    replay = Replay(None, plan)

    async def run() -> None:
        for chain in trace.chains:
            await progressive_chain(replay, chain.question, chain.sample, SETTINGS, 0)

    asyncio.run(run())
    return replay.asked


def endless(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """A step's schema whose content goes on for ever; for an answer, a text that does."""
    text = {"type": "string", "minLength": MAX_CONTENT, "maxLength": MAX_CONTENT}
    if schema is None:
        return text
    return {**schema, "properties": {**schema["properties"], "content": text}}


class Replay:
    """An engine whose calls are held to the plan and answered with the trace's texts. Without an engine
    nothing is asked.

    asked: the calls, as they are held. tokens, prompt_tokens, cached_tokens: of all replies.
    """

    independent = True

    def __init__(self, engine: Engine | None, plan: Plan) -> None:
        self.engine, self.plan = engine, plan
        self.capacity = engine.capacity if engine else 1
        self.asked: list[Request] = []
        self.tokens = self.prompt_tokens = self.cached_tokens = 0

    async def ask(self, request: Request) -> Reply:
        """Engine.ask. Raises RuntimeError for a reply that is not as long as planned."""
        held, text = self.plan.held(request), self.plan.texts[request.key]
        self.asked.append(held)
        if self.engine is None:
            return Completion(text, held.sampling.max_new_tokens, True)
        reply = await self.engine.ask(held)
        if isinstance(reply, Failure) or reply.tokens != held.sampling.max_new_tokens:
            raise RuntimeError(f"{request.key}: {held.sampling.max_new_tokens} tokens were planned: {reply}")
        self.tokens += reply.tokens
        self.prompt_tokens += reply.prompt_tokens
        self.cached_tokens += reply.cached_tokens
        return replace(reply, text=text, finished=True)

    async def close(self) -> None:
        """Engine.close."""
        if self.engine is not None:
            await self.engine.close()
