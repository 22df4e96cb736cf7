"""Chains step by step: hostile replies, retries, bounds, an append-only history; thoughts there and back."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest

from models.engines.base import Completion, Engine, Failure, Reply, Request
from models.engines.fake import ONE_STEP
from models.reasoning import (
    ACTIONS,
    MAX_ANSWER,
    MAX_CONTENT,
    MAX_TITLE,
    Settings,
    StepError,
    parse_step,
    parse_thoughts,
    progressive_chain,
    step_json,
    step_schema,
    thoughts,
)
from models.records import FailedPath, Question, ReasoningPath, Step, to_json, write_jsonl

SETTINGS = Settings(prompts="short", min_steps=1, max_steps=4, attempts=3)
Outcome = ReasoningPath | FailedPath
QUESTIONS = [Question(f"q{n}", [f"images/{n}.png"], f"What is {n}?", str(n)) for n in range(3)]


def reply(title: str = "Read", content: str = "row 1 is 3 5 8", action: str = "continue") -> str:
    return json.dumps({"title": title, "content": content, "next_action": action})


class Script:
    """An engine that says one reply after another, the last one for ever, and keeps what it was asked."""

    capacity = 8

    def __init__(self, *replies: str | Reply) -> None:
        self.replies = replies
        self.asked: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        said = self.replies[min(len(self.asked), len(self.replies) - 1)]
        self.asked.append(request)
        return Completion(said, 1, True) if isinstance(said, str) else said

    async def close(self) -> None: ...


def chain(engine: Engine, settings: Settings = SETTINGS, sample: int = 0, seed: int = 0) -> Outcome:
    """One chain of the first question."""
    return asyncio.run(progressive_chain(engine, QUESTIONS[0], sample, settings, seed))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("I think it is 7", "not JSON"),
        ('```json\n{"title":"a"}\n```', "not JSON"),
        (ONE_STEP + ONE_STEP, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"title": NaN}', "not JSON"),
        ('{"title": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("{}", "no title"),
        ('{"title":"a","content":5,"next_action":"continue"}', "no content"),
        ('{"title":"a","content":["b"],"next_action":"continue"}', "no content"),
        ('{"title":" \\n","content":"b","next_action":"continue"}', "no title"),
        ('{"title":"a","content":"b"}', "no next_action"),
        ('{"title":"a","content":"b","next_action":"stop"}', "unknown next_action"),
        ('{"title":"a","content":"b","next_action":"Continue"}', "unknown next_action"),
        (reply(title="t" * (MAX_TITLE + 1)), "too long"),
        (reply(content="c" * (MAX_CONTENT + 1)), "too long"),
        ('{"title":"a","content":"\\ud800","next_action":"continue"}', "not text"),
    ],
)
def test_a_reply_that_is_no_step_says_why(text: str, reason: str) -> None:
    with pytest.raises(StepError) as error:
        parse_step(text)
    assert error.value.reason == reason


def test_a_step_survives_its_json() -> None:
    step = Step('Sagt "ja"', "Zeile 1: 3 5 8 → größer {x}\\n", "final_answer")
    assert parse_step(step_json(step)) == step
    assert parse_step(" " + reply(content=" x ") + "\n") == Step("Read", "x", "continue")


def test_extra_keys_are_left_out_and_the_last_of_two_equal_ones_counts() -> None:
    text = '{"title":"a","title":"b","content":"c","next_action":"continue","score":1}'
    assert parse_step(text) == Step("b", "c", "continue")


def test_a_chain_ends_with_a_separate_answer() -> None:
    engine = Script(reply(), reply("Answer", "it is 16", "final_answer"), " 16 ")
    assert chain(engine) == ReasoningPath(
        "q0",
        0,
        [Step("Read", "row 1 is 3 5 8"), Step("Answer", "it is 16", "final_answer")],
        "<thoughts>\nRead: row 1 is 3 5 8\nAnswer: it is 16\n</thoughts>",
        "16",
    )
    assert [list(request.prompt.images) for request in engine.asked] == [QUESTIONS[0].images] * 3
    assert [request.goes_on for request in engine.asked] == [True, True, False]
    assert len({request.key for request in engine.asked}) == 3


def test_history_is_only_ever_appended_to_as_it_was_written() -> None:
    spaced = reply("Two").replace(",", " ,  ")
    engine = Script(reply("One"), "broken", spaced, reply("Three"), ONE_STEP, "7")
    chain(engine)
    prompts = [request.prompt.turns for request in engine.asked]
    assert [len(turns) for turns in prompts] == [1, 2, 2, 3, 4, 5]
    for earlier, later in pairwise(prompts):
        said = [*earlier[:-1], (earlier[-1][0], later[len(earlier) - 1][1])]
        assert list(later[: len(earlier)]) == said
    assert all(turns[-1][1] == "" and all(answer for _, answer in turns[:-1]) for turns in prompts)
    assert prompts[-1][1][1] == spaced


@pytest.mark.parametrize(
    ("bad", "reason", "text"),
    [
        ("broken", "not JSON", "broken"),
        (Completion(ONE_STEP, 9, False), "cut off", ONE_STEP),
        (Failure("timeout", "after 60 s"), "timeout", "after 60 s"),
    ],
)
def test_a_step_that_stays_unreadable_fails_the_chain_with_its_reason(
    bad: str | Reply, reason: str, text: str
) -> None:
    engine = Script(reply(), bad)
    outcome = chain(engine)
    assert isinstance(outcome, FailedPath)
    assert outcome.reason == reason and outcome.text == text
    assert outcome.steps == [Step("Read", "row 1 is 3 5 8")]
    assert len(engine.asked) == 1 + SETTINGS.attempts  # a step, the attempts, and no answer


def test_attempts_are_counted_for_each_step_and_drawn_anew() -> None:
    engine = Script("x", "x", reply(), "x", "x", ONE_STEP, "7")
    outcome = chain(engine)
    assert isinstance(outcome, ReasoningPath) and len(outcome.steps) == 2
    assert len({request.sampling.seed for request in engine.asked}) == len(engine.asked)


def test_every_sample_of_every_question_is_drawn_from_a_seed_of_its_own() -> None:
    seeds = set()
    for question in QUESTIONS:
        for sample in (0, 1):
            for seed in (0, 1):
                engine = Script(ONE_STEP, "7")
                asyncio.run(progressive_chain(engine, question, sample, SETTINGS, seed))
                seeds |= {request.sampling.seed for request in engine.asked}
    assert len(seeds) == 3 * 2 * 2 * 2


def test_the_step_cap_ends_a_chain() -> None:
    engine = Script(*[reply()] * 4, "7")
    outcome = chain(engine)
    assert isinstance(outcome, ReasoningPath) and len(outcome.steps) == SETTINGS.max_steps
    assert outcome.steps[-1].next_action == "final_answer"
    assert '"final_answer"' in engine.asked[-1].prompt.turns[-2][1]


def test_too_early_an_end_is_a_continue() -> None:
    engine = Script(*[ONE_STEP] * 3, "7")
    outcome = chain(engine, Settings(prompts="short", min_steps=3, max_steps=4))
    assert isinstance(outcome, ReasoningPath)
    assert [s.next_action for s in outcome.steps] == ["continue", "continue", "final_answer"]


def test_the_schema_of_a_step_leaves_the_actions_that_its_number_leaves() -> None:
    settings = Settings(min_steps=2, max_steps=4)
    actions = [step_schema(n, settings)["properties"]["next_action"]["enum"] for n in (1, 2, 3, 4)]
    assert actions == [["continue"], list(ACTIONS), list(ACTIONS), ["final_answer"]]
    engine = Script(reply(), ONE_STEP, "7")
    chain(engine)
    assert [request.schema is None for request in engine.asked] == [False, False, True]


@pytest.mark.parametrize("bad", ["", "  ", "x" * (MAX_ANSWER + 1), Completion("7", 1, False)])
def test_a_chain_without_an_answer_is_a_failed_one(bad: str | Completion) -> None:
    outcome = chain(Script(ONE_STEP, bad))
    assert isinstance(outcome, FailedPath) and outcome.reason == "no answer"


def test_an_answer_that_the_engine_gave_up_on_is_a_failed_chain() -> None:
    outcome = chain(Script(ONE_STEP, Failure("HTTP 400", "too long")))
    assert isinstance(outcome, FailedPath) and (outcome.reason, outcome.text) == ("HTTP 400", "too long")


def test_every_outcome_can_be_written(tmp_path: object) -> None:
    outcome = chain(Script('{"title":"a","content":"\\ud83d","next_action":"continue"}'))
    assert write_jsonl(f"{tmp_path}/x.jsonl", [to_json(outcome)]) == 1


@pytest.mark.parametrize(
    "steps",
    [
        [Step("Answer", "7", "final_answer")],
        [Step("Read", "row 1: 3 5 8"), Step("Work", "a: b: c"), Step("Answer", "é → {x}", "final_answer")],
        [Step("Read", "says </thoughts> and <thoughts>"), Step("Answer", "no", "final_answer")],
    ],
)
def test_thoughts_there_and_back(steps: list[Step]) -> None:
    assert parse_thoughts(thoughts(steps)) == steps


@pytest.mark.parametrize("gap", ["\n", "\n\n", "\r\n", "\u2028", "\x0b", "\x85", " \t "])
def test_a_step_is_one_line_of_thoughts_whatever_is_in_it(gap: str) -> None:
    steps = [Step(f"Look{gap}twice: here", f"first{gap}second: third", "final_answer")]
    (found,) = parse_thoughts(thoughts(steps))
    assert found.title == "Look twice - here" and found.content == "first second: third"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "<thoughts>",
        "</thoughts>",
        "<thoughts></thoughts>",
        "<thoughts>\n\n</thoughts>",
        "<thoughts>\nno colon here\n</thoughts>",
        "<thoughts>\nRead:\n</thoughts>",
        "<thoughts>\n: 7\n</thoughts>",
        "<thoughts>\nRead: 3",
        "Read: 3\n</thoughts>",
        "well <thoughts>\nRead: 3\n</thoughts>",
        "<thoughts>\nRead: 3\n</thoughts> so it is 3",
    ],
)
def test_what_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(StepError):
        parse_thoughts(text)
