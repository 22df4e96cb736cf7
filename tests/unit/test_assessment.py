"""The answer filter (right, wrong, unknown); the judge: asked once a question, no score where unreadable."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from models.assessment import (
    ModelJudge,
    RuleJudge,
    filter_answers,
    judge_prompt,
    parse_scores,
    parse_verdict,
    score_paths,
    scores_json,
)
from models.engines.base import Sampling
from models.engines.fake import FakeEngine
from models.records import Question, ReasoningPath, Step
from models.vlm import Conversation

DOG = Question("dog", ["images/dog.png"], "What animal is it?", "dog")
SUM = Question("sum", ["images/sum.png"], "What is the sum?", "16")
QUESTIONS = {q.id: q for q in (DOG, SUM)}


def path(question: Question, sample: int = 0, answer: str = "16", steps: int = 1) -> ReasoningPath:
    said = [Step("Read", f"look {n}") for n in range(steps)]
    return ReasoningPath(question.id, sample, said, f"<thoughts>\n{sample}: {answer}\n</thoughts>", answer)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"1": 1, "2": 100}', [1, 100]),
        (' {"1":55,"2":20}\n', [55, 20]),
        ('{"2": 20, "1": 55}', [55, 20]),
        ('{"1": 50}', None),
        ('{"1": 50, "2": 60, "3": 70}', None),
        ('{"1": 50, "1": 60, "2": 70}', None),
        ('{"0": 50, "1": 60}', None),
        ('{"1": 0, "2": 50}', None),
        ('{"1": 101, "2": 50}', None),
        ('{"1": -5, "2": 50}', None),
        ('{"1": 50.0, "2": 60}', None),
        ('{"1": "50", "2": 60}', None),
        ('{"1": true, "2": 60}', None),
        ('{"1": null, "2": 60}', None),
        ('{"1": NaN, "2": 60}', None),
        ('{"1": {"1": 50}, "2": 60}', None),
        ('[["1", 50], ["2", 60]]', None),
        ("[50, 60]", None),
        ("50, 60", None),
        ('Scores: {"1": 50, "2": 60}', None),
        ('{"1": 50, "2": 60', None),
        ("{}", None),
        ("", None),
        ("[" * 100_000, None),
        ('{"1": ' + "9" * 5000 + ', "2": 1}', None),
        ('{"1": 1e1, "2": 60}', None),
    ],
)
def test_scores_are_integers_by_path_number_or_nothing(text: str, scores: list[int] | None) -> None:
    assert parse_scores(text, 2) == scores


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1", True),
        (" 0.\n", False),
        ("1)", True),
        ("10", None),
        ("2", None),
        ("yes", None),
        ("", None),
        ("1 0", None),
        ("0 1", None),
        ("²", None),
    ],
)
def test_verdicts(text: str, verdict: bool | None) -> None:
    assert parse_verdict(text) is verdict


def test_the_filter_knows_right_wrong_and_unknown() -> None:
    paths = [path(SUM, 0, "16"), path(SUM, 1, "17"), path(DOG, 0, "a puppy")]
    marked, counts = filter_answers(paths, QUESTIONS)
    assert [p.right for p in marked] == [True, False, None]
    assert counts == {"by rule": 2, "unknown": 1}


def test_a_model_is_asked_only_where_rules_cannot_tell() -> None:
    said = {"a puppy": "1", "a wolf": "0", "a cub": "perhaps"}
    asked: list[tuple[Conversation, Sampling]] = []

    def reply(conversation: Conversation, sampling: Sampling) -> str:
        asked.append((conversation, sampling))
        return next(verdict for answer, verdict in said.items() if answer in conversation.turns[0][0])

    paths = [path(SUM, 0, "16"), *[path(DOG, n, answer) for n, answer in enumerate(said)], path(SUM, 1, "17")]
    marked, counts = filter_answers(paths, QUESTIONS, FakeEngine(reply), "short")
    assert [p.right for p in marked] == [True, True, False, None, False]
    assert [(p.question_id, p.sample, p.answer) for p in marked] == [
        (p.question_id, p.sample, p.answer) for p in paths
    ]
    assert len(asked) == 3 and all("dog" in c.turns[0][0] for c, _ in asked)
    assert {s.temperature for _, s in asked} == {0.2}
    assert counts == {"by rule": 2, "by model": 2, "unknown": 1} and sum(counts.values()) == len(paths)


def test_an_empty_answer_is_wrong_and_needs_no_model() -> None:
    engine = FakeEngine(lambda c, s: "1")
    marked, _ = filter_answers([path(DOG, 0, "")], QUESTIONS, engine, "short")
    assert marked[0].right is False and engine.requests == 0


def test_all_paths_of_a_question_are_scored_in_one_call() -> None:
    asked: list[Conversation] = []

    def reply(conversation: Conversation, sampling: Sampling) -> str:
        asked.append(conversation)
        assert sampling.temperature == 0
        return scores_json([30, 90] if "sum" in conversation.turns[0][0] else [55])

    paths = [path(SUM, 0), path(DOG, 0, "dog"), path(SUM, 1)]  # not side by side
    scored, unreadable = score_paths(paths, QUESTIONS, ModelJudge(FakeEngine(reply), "short"))
    assert [(p.question_id, p.sample, p.score) for p in scored] == [
        ("sum", 0, 30),
        ("dog", 0, 55),
        ("sum", 1, 90),
    ]
    assert len(asked) == 2 and unreadable == 0
    for conversation, question in zip(asked, (SUM, DOG), strict=True):
        text = conversation.turns[0][0]
        assert list(conversation.images) == question.images and conversation.turns[0][1] == ""
        assert question.question in text and question.answer in text
    assert all(f"{n}. {p.text} ({n})" in asked[0].turns[0][0] for n, p in enumerate((paths[0], paths[2]), 1))


def test_an_unreadable_reply_leaves_the_question_without_scores_and_is_counted() -> None:
    judge = ModelJudge(FakeEngine(lambda c, s: scores_json([1] if "sum" in c.turns[0][0] else [55])), "short")
    scored, unreadable = score_paths([path(SUM, 0), path(SUM, 1), path(DOG, 0)], QUESTIONS, judge)
    assert [p.score for p in scored] == [None, None, 55] and unreadable == 1


def test_nothing_to_score_asks_nothing() -> None:
    engine = FakeEngine()
    assert score_paths([], QUESTIONS, ModelJudge(engine, "short")) == ([], 0) and engine.requests == 0


def test_a_path_cannot_speak_for_the_prompt() -> None:
    hostile = Question("h", [], "Say {truth} and {paths}", "\\1 {question}")
    text = judge_prompt("short", hostile, ["{truth}", "\\g<0>"]).turns[0][0]
    assert "Say {truth} and {paths}" in text and "\\1 {question}" in text
    assert "1. {truth} (1)\n2. \\g<0> (2)" in text


def test_the_rule_judge_knows_the_answer_and_nothing_else() -> None:
    marked, _ = filter_answers([path(SUM, n, a, s) for n, (a, s) in enumerate(CASES)], QUESTIONS)
    scored, unreadable = score_paths([*marked, path(SUM, 9)], QUESTIONS, RuleJudge())
    assert [p.score for p in scored] == [100, 100, 100, 1, 1] and unreadable == 0


CASES: Sequence[tuple[str, int]] = [("16", 1), ("16", 2), ("16", 40), ("17", 5)]
