"""How well a judge agrees with the truth: what counts, and what there is nothing to say about."""

from __future__ import annotations

import pytest

from models.agreement import agreement, with_oracle
from models.records import Question, ReasoningPath, Step

BOARD = {"digits": [[3, 5, 8], [4, 0, 1], [6, 7, 2]]}
QUESTIONS = {
    "q": Question("q", ["images/q.png"], "What is the sum of the top row?", "16", annotation=BOARD),
    "own": Question("own", ["images/own.png"], "What animal?", "dog"),
}


def path(
    score: int | None, right: bool | None, question: str = "q", content: str = "top row is 3 5 8"
) -> ReasoningPath:
    return ReasoningPath(question, 0, [Step("Read", content), Step("Answer", "16")], "", "16", right, score)


def test_a_judge_that_ranks_right_above_wrong_has_auc_one() -> None:
    paths = [path(90, True), path(80, True), path(20, False)]
    assert agreement(paths, [95, 85, 15])["auc"] == 1.0
    assert agreement([path(10, True), path(50, False)], [None, None])["auc"] == 0.0
    assert agreement([path(50, True), path(50, False)], [None, None])["auc"] == 0.5


def test_a_judge_that_reads_the_answers_is_not_measured_by_them() -> None:
    paths = [path(100, True), path(1, False)]
    assert agreement(paths, [95, 15], from_answers=True) == {**agreement(paths, [95, 15]), "auc": None}


def test_ranks_are_compared_within_questions_only() -> None:
    paths = [path(10, True), path(20, True), path(70, True, "own"), path(60, True, "own")]
    found = agreement(paths, [50, 60, 5, 1])  # between the questions the judge has it the wrong way round
    assert found["rank_correlation"] == pytest.approx(1) and found["questions"] == 2


def test_where_there_is_nothing_to_compare_there_is_no_number() -> None:
    for paths, truths in (
        ([], []),
        ([path(None, True)], [50.0]),
        ([path(50, None)], [None]),
        ([path(9, True)], [9.0]),
    ):
        assert agreement(paths, truths) == {"auc": None, "rank_correlation": None, "questions": 0}


def test_paths_without_a_score_count_nowhere() -> None:
    paths = [path(90, True), path(None, True), path(None, False), path(10, False)]
    assert agreement(paths, [90.0, 1.0, 99.0, 10.0]) == agreement([paths[0], paths[3]], [90.0, 10.0])


def test_the_oracle_speaks_of_annotated_questions_only() -> None:
    said = [path(1, True), path(1, True, content="top row is 3 5 9"), path(1, False, "own")]
    marked, scores = with_oracle(said, QUESTIONS)
    assert [p.oracle for p in marked] == [
        {"step_accuracy": 1.0, "steps": [True, None]},
        {"step_accuracy": 0.0, "steps": [False, None]},
        None,
    ]
    assert scores[0] is not None and scores[1] is not None and scores[0] > scores[1] and scores[2] is None
    assert [(p.score, p.right) for p in marked] == [(p.score, p.right) for p in said]
