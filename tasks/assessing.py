"""What the stages that assess paths share: every answer checked, every question's paths scored in one call.

marked, how = mark_all(paths, questions, engine, "short")
scored, unreadable = score_all(marked, questions, judge)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.sampling import run_all

if TYPE_CHECKING:
    from models.assessment import PathJudge
    from models.engines.base import Engine
    from models.records import Question, ReasoningPath


def surviving(paths: Sequence[ReasoningPath]) -> list[ReasoningPath]:
    """Right paths: what `assess` has scored."""
    return [path for path in paths if path.right is True]


def mixed(paths: Sequence[ReasoningPath]) -> list[ReasoningPath]:
    """Paths of questions with something to decide, a right and a wrong path: what `score` has scored."""
    groups = by_question(paths).values()
    return [path for group in groups if {p.right for p in group} >= {True, False} for path in group]


def by_question(paths: Sequence[ReasoningPath]) -> dict[str, list[ReasoningPath]]:
    """Paths by their question, in order."""
    groups: dict[str, list[ReasoningPath]] = {}
    for path in paths:
        groups.setdefault(path.question_id, []).append(path)
    return groups


def mark_all(
    paths: Sequence[ReasoningPath],
    questions: Mapping[str, Question],
    engine: Engine | None = None,
    prompts: str = "full",
) -> tuple[list[ReasoningPath], Counter[str]]:
    """Every path marked right, wrong or unknown (None), in order, and how many were decided how."""
    from models.assessment import mark_answer

    marked = run_all(
        lambda path: mark_answer(path, questions[path.question_id], engine, prompts),
        paths,
        [engine] if engine else [],
        "answers checked",
    )
    return [path for path, _ in marked], Counter(how for _, how in marked)


def score_all(
    paths: Sequence[ReasoningPath], questions: Mapping[str, Question], judge: PathJudge
) -> tuple[list[ReasoningPath], int]:
    """The paths with scores, in order, and how many questions gave no readable reply."""
    from models.assessment import score_paths

    groups = by_question(paths)
    results = run_all(
        lambda name: score_paths(groups[name], questions[name], judge),
        list(groups),
        judge.engines,
        "questions judged",
    )
    scores = {(path.question_id, path.sample): path.score for scored, _ in results for path in scored}
    scored = [replace(path, score=scores[path.question_id, path.sample]) for path in paths]
    return scored, sum(not readable for _, readable in results)
