"""The step loop: hostile replies, retries, bounds, an append-only history; thoughts there and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from models.engines.base import Completion, Sampling
from models.engines.fake import ONE_STEP, FakeEngine
from models.reasoning import (
    MAX_ANSWER,
    MAX_CONTENT,
    MAX_TITLE,
    Settings,
    StepError,
    StepLoop,
    parse_step,
    parse_thoughts,
    step_json,
    thoughts,
)
from models.records import FailedPath, Question, ReasoningPath, Step, to_json, write_jsonl
from models.vlm import Conversation

SETTINGS = Settings(prompts="short", min_steps=1, max_steps=4, attempts=3)
QUESTIONS = [Question(f"q{n}", [f"images/{n}.png"], f"What is {n}?", str(n)) for n in range(3)]


def reply(title: str = "Read", content: str = "row 1 is 3 5 8", action: str = "continue") -> str:
    return json.dumps({"title": title, "content": content, "next_action": action})


class Script:
    """An engine that replies from a list to each question's calls, and keeps what it was asked."""

    batch_size = 8

    def __init__(self, *replies: str | Completion) -> None:
        self.replies = replies
        self.asked: list[list[Conversation]] = []
        self.samplings: list[Sampling] = []

    def generate(self, prompts: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        said = self.replies[min(len(self.asked), len(self.replies) - 1)]
        self.asked.append(list(prompts))
        self.samplings.append(sampling)
        done = said if isinstance(said, Completion) else Completion(said, 1, True)
        return [done for _ in prompts]


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
    outcomes = StepLoop(engine, SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    assert outcomes == [
        ReasoningPath(
            "q0",
            0,
            [Step("Read", "row 1 is 3 5 8"), Step("Answer", "it is 16", "final_answer")],
            "<thoughts>\nRead: row 1 is 3 5 8\nAnswer: it is 16\n</thoughts>",
            "16",
        )
    ]


def test_outcomes_are_in_order_of_question_and_sample_and_pictures_are_passed() -> None:
    engine = Script(ONE_STEP, "7")
    outcomes = StepLoop(engine, SETTINGS).run(QUESTIONS, [0, 1], seed=0)
    expected = [(q.id, n) for q in QUESTIONS for n in (0, 1)]
    assert [(o.question_id, o.sample) for o in outcomes] == expected
    for asked in engine.asked:
        assert [list(c.images) for c in asked] == [q.images for q in QUESTIONS for _ in (0, 1)]


def test_no_questions_no_outcomes() -> None:
    assert StepLoop(FakeEngine(), SETTINGS).run([], [0], seed=0) == []
    assert StepLoop(FakeEngine(), SETTINGS).run(QUESTIONS, [], seed=0) == []


def test_history_is_only_ever_appended_to() -> None:
    engine = Script(reply("One"), "broken", reply("Two"), reply("Three"), ONE_STEP, "7")
    StepLoop(engine, SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    prompts = [asked[0].turns for asked in engine.asked]
    assert [len(turns) for turns in prompts] == [1, 2, 2, 3, 4, 5]
    for earlier, later in pairwise(prompts):
        said = [*earlier[:-1], (earlier[-1][0], later[len(earlier) - 1][1])]
        assert list(later[: len(earlier)]) == said
    assert all(turns[-1][1] == "" and all(answer for _, answer in turns[:-1]) for turns in prompts)


@pytest.mark.parametrize("bad", ["broken", Completion(ONE_STEP, 9, False)])
def test_a_step_that_stays_unreadable_fails_the_chain_with_its_reason(bad: str | Completion) -> None:
    engine = Script(reply(), bad)
    (outcome,) = StepLoop(engine, SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    assert isinstance(outcome, FailedPath)
    assert outcome.reason == ("not JSON" if bad == "broken" else "cut off")
    assert outcome.text == (bad if isinstance(bad, str) else bad.text)
    assert outcome.steps == [Step("Read", "row 1 is 3 5 8")]
    assert len(engine.asked) == 1 + SETTINGS.attempts + 1  # a step, the attempts, and no answer of any chain
    assert engine.asked[-1] == []


def test_attempts_are_counted_for_each_step_and_drawn_anew() -> None:
    engine = Script("x", "x", reply(), "x", "x", ONE_STEP, "7")
    (outcome,) = StepLoop(engine, SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    assert isinstance(outcome, ReasoningPath) and len(outcome.steps) == 2
    assert len({sampling.seed for sampling in engine.samplings}) == len(engine.samplings)


def test_a_failed_chain_does_not_stop_the_others() -> None:
    engine = FakeEngine(lambda c, s: "junk" if "What is 1?" in c.turns[0][0] else ONE_STEP)
    outcomes = StepLoop(engine, SETTINGS).run(QUESTIONS, [0], seed=0)
    assert [type(o) for o in outcomes] == [ReasoningPath, FailedPath, ReasoningPath]
    assert engine.requests == 2 * 2 + SETTINGS.attempts


def test_the_step_cap_ends_a_chain() -> None:
    engine = Script(*[reply()] * 4, "7")
    (outcome,) = StepLoop(engine, SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    assert isinstance(outcome, ReasoningPath) and len(outcome.steps) == SETTINGS.max_steps
    assert outcome.steps[-1].next_action == "final_answer"
    assert '"final_answer"' in engine.asked[-1][0].turns[-2][1]


def test_too_early_an_end_is_a_continue() -> None:
    engine = Script(*[ONE_STEP] * 3, "7")
    loop = StepLoop(engine, Settings(prompts="short", min_steps=3, max_steps=4))
    (outcome,) = loop.run(QUESTIONS[:1], [0], seed=0)
    assert isinstance(outcome, ReasoningPath)
    assert [s.next_action for s in outcome.steps] == ["continue", "continue", "final_answer"]


@pytest.mark.parametrize("bad", ["", "  ", "x" * (MAX_ANSWER + 1), Completion("7", 1, False)])
def test_a_chain_without_an_answer_is_a_failed_one(bad: str | Completion) -> None:
    (outcome,) = StepLoop(Script(ONE_STEP, bad), SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    assert isinstance(outcome, FailedPath) and outcome.reason == "no answer"


def test_every_outcome_can_be_written(tmp_path: object) -> None:
    engine = Script('{"title":"a","content":"\\ud83d","next_action":"continue"}')
    outcomes = StepLoop(engine, SETTINGS).run(QUESTIONS[:1], [0], seed=0)
    assert write_jsonl(f"{tmp_path}/x.jsonl", [to_json(outcome) for outcome in outcomes]) == 1


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


def test_the_same_seed_asks_the_same() -> None:
    def run(engine_reply: Callable[[Conversation, Sampling], str]) -> list[object]:
        return list(StepLoop(FakeEngine(engine_reply), SETTINGS).run(QUESTIONS, [0, 1], seed=7))

    def by_seed(conversation: Conversation, sampling: Sampling) -> str:
        return reply(content=f"drawn with {sampling.seed}", action="final_answer")

    assert run(by_seed) == run(by_seed)
