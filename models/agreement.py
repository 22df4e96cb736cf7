"""How well a judge agrees with the truth: rank correlation within questions,
AUC of right against wrong paths.

from models.agreement import agreement, with_oracle
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.records import Question, ReasoningPath
from models.statistics import auc, within_groups


def agreement(
    paths: Sequence[ReasoningPath], truths: Sequence[float | None], from_answers: bool = False
) -> dict[str, Any]:
    """The judge's scores of `paths` against the oracle's (`truths`, None where there is no annotation).

    auc: chance that the judge scores a right path above a wrong one; None for a judge that scores by the
    answers (`from_answers`): it would be 1 by construction. rank_correlation: Kendall's tau within questions,
    averaged over the `questions` where both sides vary; None where the data cannot give it.
    """
    known = [path for path in paths if path.score is not None and path.right is not None]
    pairs = [
        (path, truth)
        for path, truth in zip(paths, truths, strict=True)
        if path.score is not None and truth is not None
    ]
    within = within_groups(
        [path.question_id for path, _ in pairs],
        [path.score or 0 for path, _ in pairs],
        [truth for _, truth in pairs],
    )
    right = [path.right is True for path in known]
    return {
        "auc": None if from_answers else auc([path.score or 0 for path in known], right),
        "rank_correlation": within.kendall,
        "questions": within.questions,
    }


def with_oracle(
    paths: Sequence[ReasoningPath], questions: Mapping[str, Question]
) -> tuple[list[ReasoningPath], list[float | None]]:
    """The paths with what the annotation says of their steps, and the
    oracle's score of each (boards only)."""
    from dataclasses import replace

    import numpy as np

    from models.boards.oracle import assess_path

    marked: list[ReasoningPath] = []
    scores: list[float | None] = []
    for path in paths:
        annotation = questions[path.question_id].annotation
        if not annotation or "digits" not in annotation:
            marked.append(path)
            scores.append(None)
            continue
        text = questions[path.question_id].question
        verdict = assess_path(path.steps, path.right is True, np.array(annotation["digits"]), text)
        said = {"step_accuracy": round(verdict.step_accuracy, 4), "steps": list(verdict.steps)}
        marked.append(replace(path, oracle=said))
        scores.append(float(verdict.score))
    return marked, scores
