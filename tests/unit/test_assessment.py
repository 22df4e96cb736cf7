"""The answer filter (right, wrong, unknown); the judge: asked once a question, no score where unreadable."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from models.assessment import (
    ModelJudge,
    RuleJudge,
    judge_prompt,
    mark_answer,
    parse_scores,
    parse_verdict,
    score_paths,
    scores_json,
    scores_schema,
)
from models.engines.base import Engine, Failure, Reply, Request
from models.engines.fake import FakeEngine
from models.records import Question, ReasoningPath, Step

DOG = Question("dog", ["images/dog.png"], "What animal is it?", "dog")
SUM = Question("sum", ["images/sum.png"], "What is the sum?", "16")


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


def mark(answer: str, question: Question, engine: Engine | None = None) -> tuple[bool | None, str]:
    """What becomes of an answer, and how."""
    asked = path(question, 3, answer)
    marked, how = asyncio.run(mark_answer(asked, question, engine, "short"))
    assert replace(marked, right=None) == asked
    return marked.right, how


def test_the_filter_knows_right_wrong_and_unknown() -> None:
    assert mark("16", SUM) == (True, "by rule") and mark("17", SUM) == (False, "by rule")
    assert mark("a puppy", DOG) == (None, "unknown")


@pytest.mark.parametrize(
    ("said", "outcome"),
    [("1", (True, "by model")), ("0", (False, "by model")), ("perhaps", (None, "unknown"))],
)
def test_a_model_is_asked_only_where_rules_cannot_tell(said: str, outcome: tuple[bool | None, str]) -> None:
    asked: list[Request] = []
    engine = FakeEngine(lambda request: (asked.append(request), said)[1])
    assert mark("a puppy", DOG, engine) == outcome
    assert "dog" in asked[0].prompt.turns[0][0] and "a puppy" in asked[0].prompt.turns[0][0]
    assert asked[0].sampling.temperature == 0.2
    assert mark("17", SUM, engine) == (False, "by rule") and len(asked) == 1


def test_a_verdict_that_never_came_leaves_the_answer_unknown() -> None:
    assert mark("a puppy", DOG, Silent()) == (None, "unknown")


def test_an_empty_answer_is_wrong_and_needs_no_model() -> None:
    engine = FakeEngine(lambda request: "1")
    assert mark("", DOG, engine) == (False, "by rule") and engine.requests == 0


class Silent(FakeEngine):
    """Gives up on every request."""

    async def ask(self, request: Request) -> Reply:
        return Failure("timeout")


def score(paths: list[ReasoningPath], engine: Engine) -> tuple[list[int | None], bool]:
    scored, readable = asyncio.run(score_paths(paths, SUM, ModelJudge(engine, "short")))
    assert [replace(p, score=None) for p in scored] == paths
    return [p.score for p in scored], readable


def test_all_paths_of_a_question_are_scored_in_one_call() -> None:
    asked: list[Request] = []
    engine = FakeEngine(lambda request: (asked.append(request), scores_json([30, 90]))[1])
    paths = [path(SUM, 0), path(SUM, 1)]
    assert score(paths, engine) == ([30, 90], True)
    (request,) = asked
    text = request.prompt.turns[0][0]
    assert list(request.prompt.images) == SUM.images and request.prompt.turns[0][1] == ""
    assert SUM.question in text and SUM.answer in text and request.sampling.temperature == 0
    assert all(f"{n}. {p.text} ({n})" in text for n, p in enumerate(paths, 1))
    assert request.schema == scores_schema(2) and set(request.schema["required"]) == {"1", "2"}


@pytest.mark.parametrize("engine", [FakeEngine(lambda request: scores_json([1])), Silent()])
def test_an_unreadable_reply_leaves_the_question_without_scores(engine: Engine) -> None:
    assert score([path(SUM, 0), path(SUM, 1)], engine) == ([None, None], False)


def test_nothing_to_score_asks_nothing() -> None:
    engine = FakeEngine()
    assert score([], engine) == ([], True) and engine.requests == 0


def test_a_path_cannot_speak_for_the_prompt() -> None:
    hostile = Question("h", [], "Say {truth} and {paths}", "\\1 {question}")
    text = judge_prompt("short", hostile, ["{truth}", "\\g<0>"]).turns[0][0]
    assert "Say {truth} and {paths}" in text and "\\1 {question}" in text
    assert "1. {truth} (1)\n2. \\g<0> (2)" in text


def test_the_rule_judge_knows_the_answer_and_nothing_else() -> None:
    cases = [("16", 1, True), ("16", 2, True), ("16", 40, True), ("17", 5, False), ("16", 1, None)]
    paths = [
        replace(path(SUM, n, answer, steps), right=right) for n, (answer, steps, right) in enumerate(cases)
    ]
    assert asyncio.run(RuleJudge().score(SUM, paths)) == [100, 100, 100, 1, 1]
