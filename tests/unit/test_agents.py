"""Two agents: both see the picture, a failed reasoner leaves the question to the other and is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from models.agents import AgentAnswer, answer_directly, answer_with_agents, sample_reasoning
from models.engines.base import Completion, Engine, Failure, Reply, Request, Sampling
from models.prompts import fill
from models.records import FailedPath, Question, ReasoningPath, Step
from models.vlm import Conversation

THOUGHTS = "<thoughts>\nRead: row 1 is 3 5 8\nAnswer: 16\n</thoughts>"
QUESTIONS = [Question(f"q{n}", [f"images/{n}.png"], f"Question {n}?", "16") for n in range(3)]


class Recorder:
    """An engine that keeps what it was asked and answers by a function of the question's number."""

    capacity = 8

    def __init__(self, reply: Callable[[int], Reply]) -> None:
        self.reply = reply
        self.asked: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        return self.reply(int(str(request.prompt.turns[0][0]).split("Question ")[1][0]))

    async def close(self) -> None: ...

    @property
    def prompts(self) -> list[Conversation]:
        return [request.prompt for request in self.asked]

    @property
    def samplings(self) -> set[Sampling]:
        return {request.sampling for request in self.asked}


def by_agents(reasoner: Engine, summariser: Engine, *limits: int) -> list[AgentAnswer]:
    """Every question through both agents."""

    async def run() -> list[AgentAnswer]:
        return [await answer_with_agents(reasoner, summariser, q, "short", *limits) for q in QUESTIONS]

    return asyncio.run(run())


def says(text: str, finished: bool = True) -> Recorder:
    return Recorder(lambda n: Completion(text, len(text.split()), finished))


def test_the_picture_goes_to_both_agents_and_the_reasoning_to_the_second() -> None:
    reasoner, summariser = says(THOUGHTS), says(" 16\n")
    answers = by_agents(reasoner, summariser, 50, 5)
    for engine in (reasoner, summariser):
        assert [list(c.images) for c in engine.prompts] == [q.images for q in QUESTIONS]
        assert all(q.question in c.turns[0][0] for c, q in zip(engine.prompts, QUESTIONS, strict=True))
    assert all(THOUGHTS in c.turns[0][0] for c in summariser.prompts)
    assert not any("16" in c.turns[0][0] for c in reasoner.prompts)
    assert {(a.answer, a.reasoning, a.reasoning_tokens, a.failure) for a in answers} == {
        ("16", THOUGHTS, len(THOUGHTS.split()), None)
    }
    assert reasoner.samplings == {Sampling(max_new_tokens=50)}
    assert summariser.samplings == {Sampling(max_new_tokens=5)}


@pytest.mark.parametrize(
    ("reply", "reason", "kept"),
    [
        (Completion("it is 16", 4, True), "no thoughts frame", ("it is 16", 4)),
        (Completion("", 0, True), "no thoughts frame", ("", 0)),
        (Completion("<thoughts>\n\n</thoughts>", 4, True), "no steps", ("<thoughts>\n\n</thoughts>", 4)),
        (Completion(THOUGHTS, 4, False), "reasoning cut off", (THOUGHTS, 4)),
        (Failure("timeout", "after 60 s"), "timeout", (None, 0)),
    ],
)
def test_a_reasoner_that_fails_leaves_the_question_to_the_summary_agent(
    reply: Reply, reason: str, kept: tuple[str | None, int]
) -> None:
    reasoner = Recorder(lambda n: reply if n == 1 else Completion(THOUGHTS, 9, True))
    summariser = says("16")
    answers = by_agents(reasoner, summariser)
    assert [a.failure for a in answers] == [None, reason, None] and [a.answer for a in answers] == ["16"] * 3
    alone = summariser.prompts[1]
    assert alone.turns == [(fill("short", "direct", question=QUESTIONS[1].question), "")]
    assert list(alone.images) == QUESTIONS[1].images
    assert (answers[1].reasoning, answers[1].reasoning_tokens) == kept


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Completion("one hundred and", 3, False), "answer cut off"),
        (Failure("HTTP 400", "too long"), "HTTP 400"),
    ],
)
def test_an_answer_that_did_not_come_is_a_failure_of_either_system(reply: Reply, reason: str) -> None:
    direct = asyncio.run(answer_directly(Recorder(lambda n: reply), QUESTIONS[0], "short", 3))
    agents = by_agents(says(THOUGHTS), Recorder(lambda n: reply))
    assert {direct.failure, *(answer.failure for answer in agents)} == {reason}
    assert agents[0].reasoning == THOUGHTS


def test_answering_directly_is_one_greedy_call_with_the_picture() -> None:
    engine = says(" 16 ")
    answer = asyncio.run(answer_directly(engine, QUESTIONS[0], "short", 7))
    assert (answer.answer, answer.reasoning, answer.failure) == ("16", None, None)
    assert [list(c.images) for c in engine.prompts] == [QUESTIONS[0].images]
    assert engine.samplings == {Sampling(max_new_tokens=7)}


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (
            Completion(THOUGHTS, 3, True),
            ReasoningPath(
                "q0",
                1,
                [Step("Read", "row 1 is 3 5 8"), Step("Answer", "16", "final_answer")],
                THOUGHTS,
                "",
            ),
        ),
        (Completion("junk", 3, True), FailedPath("q0", 1, "no thoughts frame", "junk")),
        (Completion(THOUGHTS, 3, False), FailedPath("q0", 1, "reasoning cut off", THOUGHTS)),
        (Failure("timeout", "after 60 s"), FailedPath("q0", 1, "timeout", "after 60 s")),
    ],
)
def test_a_sample_is_a_path_or_a_failure_with_its_reason(
    reply: Reply, outcome: ReasoningPath | FailedPath
) -> None:
    engine = Recorder(lambda n: reply)
    assert asyncio.run(sample_reasoning(engine, QUESTIONS[0], 1, "short", Sampling(1.0))) == outcome


def test_every_sample_has_a_seed_of_its_own() -> None:
    engine = says(THOUGHTS)

    async def run() -> None:
        for question in QUESTIONS:
            for sample in (0, 1):
                for seed in (0, 4):
                    await sample_reasoning(engine, question, sample, "short", Sampling(1.0, seed=seed))

    asyncio.run(run())
    assert len(engine.samplings) == 3 * 2 * 2
