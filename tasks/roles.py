"""Which model plays which role, and how stages reach it: engines, judges and the questions of a pool.

from tasks.roles import policy_engine, path_judge, training_questions
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.stage import StageError

if TYPE_CHECKING:
    from models.assessment import PathJudge
    from models.engines.local import LocalEngine
    from models.records import Question

DATA = Path("data")
RECORDS = DATA / "records.jsonl"
GENERATOR = Path("artifacts/foundation/generator")


def engine(checkpoint: str | Path, batch_size: int) -> LocalEngine:
    """The engine of a checkpoint folder, with pictures from data/."""
    from models.engines.local import LocalEngine

    return LocalEngine.load(checkpoint, DATA, batch_size)


def path_judge(folder: str | Path, prompts: str, batch_size: int) -> PathJudge:
    """The judge that the `judge` stage published: its checkpoint, or rules where there is none."""
    from models.assessment import ModelJudge, RuleJudge

    checkpoint = Path(folder) / "checkpoint"
    return ModelJudge(engine(checkpoint, batch_size), prompts) if checkpoint.is_dir() else RuleJudge()


def answer_filter(kind: str, batch_size: int) -> LocalEngine | None:
    """Who decides where rules cannot tell two answers apart: the generator (`model`), or nobody (`rules`)."""
    return engine(GENERATOR, batch_size) if kind == "model" else None


def training_questions(pool: str, count: int, offset: int = 0, seed: int = 0) -> list[Question]:
    """`count` training questions of a pool in a fixed random order,
    from `offset` on, around its end if need be."""
    import numpy as np

    from models.records import read_questions

    questions = read_questions(RECORDS, split="train", pool=pool)
    if not questions:
        raise StageError(f"data/ has no training questions for {pool}: add records with split 'train'")
    order = np.random.default_rng([seed, len(questions)]).permutation(len(questions))
    count = min(count, len(questions))
    return [questions[order[(offset + i) % len(questions)]] for i in range(count)]


def by_id(questions: list[Question]) -> dict[str, Question]:
    """Questions by their id."""
    return {question.id: question for question in questions}


def lengths(engine: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, by the engine's tokenizer."""
    return [len(engine.encoder.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
