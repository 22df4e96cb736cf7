"""The judges, and the questions of a pool.

with path_judge("artifacts/judge", "short", questions, stage) as judge:
    scored, unreadable = score_all(paths, by_id(questions), judge)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tasks import engines
from tasks.engines import DATA
from tasks.stage import StageError, StageRun

if TYPE_CHECKING:
    from models.assessment import PathJudge
    from models.engines.base import Engine
    from models.images import ImageSource
    from models.records import Question

RECORDS = DATA / "records.jsonl"
GENERATOR = Path("artifacts/foundation/generator")
JUDGE = Path("artifacts/judge")
JUDGE_FILE = "judge.json"
"""What kind of judge a folder of the `judge` stage holds."""


def judge_kind(folder: str | Path) -> str:
    """`model` or `rules`."""
    return str(json.loads((Path(folder) / JUDGE_FILE).read_text(encoding="utf-8"))["kind"])


@contextmanager
def path_judge(
    folder: str | Path,
    prompts: str,
    questions: Sequence[Question],
    stage: StageRun,
    images: ImageSource | Path = DATA,
) -> Iterator[PathJudge]:
    """The judge that the `judge` stage published in `folder`: a model, or rules."""
    from models.assessment import ModelJudge, RuleJudge

    if judge_kind(folder) == "rules":
        yield RuleJudge()
        return
    checkpoint = Path(folder) / "checkpoint"
    with engines.open_engine("path_judge", checkpoint, questions, stage, images) as engine:
        yield ModelJudge(engine, prompts)


@contextmanager
def answer_filter(
    kind: Literal["rules", "model"], questions: Sequence[Question], stage: StageRun
) -> Iterator[Engine | None]:
    """Who decides where rules cannot tell two answers apart: the generator (`model`), or nobody (`rules`)."""
    if kind == "rules":
        yield None
        return
    with engines.open_engine("answer_judge", GENERATOR, questions, stage) as engine:
        yield engine


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
