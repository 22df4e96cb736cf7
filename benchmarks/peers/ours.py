"""Our own client as a stage uses it: watched, journalled on disk, results in order.

python benchmarks/peers/ours.py URL CALLS IN_FLIGHT FOLDER [chains]

Without `chains` every call stands alone, as the peers' do. With it, chains of three steps and an answer are
sampled: each call shows an image and all that was said before, and asks for a step by JSON schema.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image
from workload import MAX_TOKENS, MODEL, arguments, measured, prompt, report

from models.engines.base import Completion, Engine, Request, Sampling
from models.engines.journalled import JournalledEngine
from models.engines.openai import OpenAIEngine
from models.engines.watched import WatchedEngine
from models.journal import Journal
from models.reasoning import Settings, progressive_chain
from models.records import Question
from models.vlm import Conversation
from tasks.sampling import Row, run_all, sample_chains

STEPS, SAMPLES, IMAGE_SIZE = 3, 4, 48


def ask_calls(engine: Engine, calls: int) -> list[str]:
    """Texts of single calls."""

    def request(number: int) -> Request:
        sampling = Sampling(0.7, 0.95, 1.05, MAX_TOKENS, number)
        return Request(f"q{number}/0/answer", Conversation([], [(prompt(number), "")]), sampling)

    async def ask(number: int) -> str:
        reply = await engine.ask(request(number))
        return reply.text if isinstance(reply, Completion) else ""

    return run_all(ask, range(calls), [engine], "calls")


def sample(engine: Engine, questions: list[Question], folder: Path) -> list[str]:
    """The prompt of every call whose answer has come: what a finished chain holds."""
    settings, done = Settings("full", STEPS, STEPS, MAX_TOKENS, attempts=1), []

    def take(row: Row) -> None:
        done.extend([prompt(0)] * (len(row["steps"]) + ("reason" not in row)))

    sample_chains(
        engine,
        questions,
        SAMPLES,
        lambda engine, question, sample: progressive_chain(engine, question, sample, settings, 0),
        [],
        64,
        folder,
        take,
    )
    return done


def make_questions(calls: int, folder: Path) -> list[Question]:
    """Each with an image of its own, of noise, which no format makes smaller."""
    questions = []
    for number in range(calls // (STEPS + 1) // SAMPLES):
        pixels = random.Random(number).randbytes(3 * IMAGE_SIZE**2)
        Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), pixels).save(folder / f"{number}.png")
        questions.append(Question(f"q{number}", [f"{number}.png"], prompt(number), "7"))
    return questions


def main() -> None:
    """Engine and journal are opened and closed within what is measured."""
    chains = sys.argv[-1] == "chains" and bool(sys.argv.pop())
    url, calls, in_flight, name = arguments()
    folder = Path(name)
    questions = make_questions(calls, folder) if chains else []
    with measured() as figures, Journal(folder / "generator.journal") as journal:
        engine = JournalledEngine(WatchedEngine(OpenAIEngine(url, MODEL, folder, in_flight)), journal)
        answers = sample(engine, questions, folder) if chains else ask_calls(engine, calls)
    report(figures, answers)


if __name__ == "__main__":
    main()
