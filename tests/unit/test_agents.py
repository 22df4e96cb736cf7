"""Two agents: both see the picture, a failed reasoner leaves the question to the other and is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from models.agents import answer_directly, answer_with_agents, sample_reasoning
from models.engines.base import Completion, Sampling
from models.prompts import fill
from models.records import FailedPath, Question, ReasoningPath, Step
from models.vlm import Conversation

THOUGHTS = "<thoughts>\nRead: row 1 is 3 5 8\nAnswer: 16\n</thoughts>"
QUESTIONS = [Question(f"q{n}", [f"images/{n}.png"], f"Question {n}?", "16") for n in range(3)]


class Recorder:
    """An engine that keeps what it was asked and answers by a function of the question's number."""

    batch_size = 8

    def __init__(self, reply: Callable[[int], Completion]) -> None:
        self.reply = reply
        self.asked: list[Conversation] = []
        self.samplings: list[Sampling] = []

    def generate(self, prompts: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        self.asked += prompts
        self.samplings.append(sampling)
        return [self.reply(int(str(p.turns[0][0]).split("Question ")[1][0])) for p in prompts]


def says(text: str, finished: bool = True) -> Recorder:
    return Recorder(lambda n: Completion(text, len(text.split()), finished))


def test_the_picture_goes_to_both_agents_and_the_reasoning_to_the_second() -> None:
    reasoner, summariser = says(THOUGHTS), says(" 16\n")
    answers = answer_with_agents(reasoner, summariser, QUESTIONS, "short", 50, 5)
    for engine in (reasoner, summariser):
        assert [list(c.images) for c in engine.asked] == [q.images for q in QUESTIONS]
        assert [q.question in c.turns[0][0] for c, q in zip(engine.asked, QUESTIONS, strict=True)] == [
            True
        ] * 3
    assert all(THOUGHTS in c.turns[0][0] for c in summariser.asked)
    assert not any("16" in c.turns[0][0] for c in reasoner.asked)
    assert {(a.answer, a.reasoning, a.reasoning_tokens, a.failure) for a in answers} == {
        ("16", THOUGHTS, len(THOUGHTS.split()), None)
    }
    assert reasoner.samplings == [Sampling(max_new_tokens=50)]
    assert summariser.samplings == [Sampling(max_new_tokens=5)]


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        ("it is 16", True, "no thoughts frame"),
        ("", True, "no thoughts frame"),
        ("<thoughts>\n\n</thoughts>", True, "no steps"),
        (THOUGHTS, False, "reasoning cut off"),
    ],
)
def test_a_reasoner_that_fails_leaves_the_question_to_the_summary_agent(
    text: str, finished: bool, reason: str
) -> None:
    reasoner = Recorder(lambda n: Completion(text, 4, finished) if n == 1 else Completion(THOUGHTS, 9, True))
    summariser = says("16")
    answers = answer_with_agents(reasoner, summariser, QUESTIONS, "short")
    assert [a.failure for a in answers] == [None, reason, None] and [a.answer for a in answers] == ["16"] * 3
    alone = summariser.asked[1]
    assert alone.turns == [(fill("short", "direct", question=QUESTIONS[1].question), "")]
    assert list(alone.images) == QUESTIONS[1].images
    assert answers[1].reasoning == text and answers[1].reasoning_tokens == 4


def test_an_answer_cut_off_is_a_failure_of_either_system() -> None:
    direct = answer_directly(says("one hundred and", finished=False), QUESTIONS[:1], "short", 3)
    agents = answer_with_agents(says(THOUGHTS), says("one hundred", finished=False), QUESTIONS[:1], "short")
    assert [direct[0].failure, agents[0].failure] == ["answer cut off"] * 2


def test_answering_directly_is_one_greedy_call_with_the_picture() -> None:
    engine = says(" 16 ")
    answers = answer_directly(engine, QUESTIONS, "short", 7)
    assert [(a.answer, a.reasoning, a.failure) for a in answers] == [("16", None, None)] * 3
    assert [list(c.images) for c in engine.asked] == [q.images for q in QUESTIONS]
    assert engine.samplings == [Sampling(max_new_tokens=7)]


def test_no_questions_no_answers() -> None:
    assert answer_with_agents(says("x"), says("x"), [], "short") == []
    assert answer_directly(says("x"), [], "short") == []
    assert sample_reasoning(says("x"), [], 4, "short", Sampling()) == []


def test_samples_come_in_order_of_question_and_number_failures_among_them() -> None:
    engine = Recorder(lambda n: Completion("junk" if n == 1 else THOUGHTS, 3, n != 2))
    outcomes = sample_reasoning(engine, QUESTIONS, 2, "short", Sampling(1.0, seed=4))
    assert [(o.question_id, o.sample) for o in outcomes] == [(q.id, n) for q in QUESTIONS for n in (0, 1)]
    steps = [Step("Read", "row 1 is 3 5 8"), Step("Answer", "16", "final_answer")]
    assert outcomes[0] == ReasoningPath("q0", 0, steps, THOUGHTS, "")
    assert outcomes[2] == FailedPath("q1", 0, "no thoughts frame", "junk")
    assert outcomes[4] == FailedPath("q2", 0, "reasoning cut off", THOUGHTS)
    assert engine.samplings == [Sampling(1.0, seed=4)]
