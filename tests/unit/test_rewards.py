"""Rewards of chains: right above wrong above unreadable, every path of a question judged in one call."""

from __future__ import annotations

import pytest

from models.assessment import ModelJudge, RuleJudge
from models.engines.base import Request
from models.engines.fake import FakeEngine
from models.records import Question
from models.rewards import RewardWeights, judged_reward
from tasks import grpo
from tasks.params import ParamsError, parse

SUM = Question("sum", ["images/sum.png"], "What is the sum?", "16")
DOG = Question("dog", ["images/dog.png"], "What animal is it?", "dog")
WEIGHTS = RewardWeights(answer=1.0, path=0.5, form=0.1)


def chain(answer: str) -> str:
    return f"<thoughts>\nRead: 7 and 9\nAnswer: {answer}\n</thoughts>"


def test_rules_reward_the_answer_and_the_form() -> None:
    reward = judged_reward([SUM, DOG], WEIGHTS, "short", RuleJudge())
    said = [chain("16"), chain("17"), "16", chain("16")[:-3], chain("dog"), chain("a puppy")]
    assert reward([0] * 4 + [1] * 2, said) == pytest.approx([1.6, 0.105, 0.0, 0.0, 1.6, 1.6])


def test_what_rules_cannot_tell_earns_the_mean_of_its_group() -> None:
    reward = judged_reward([DOG], WEIGHTS, "short", RuleJudge())
    found = reward([0] * 4, [chain("a puppy"), chain("dog"), "unreadable", chain("yes and no")])
    assert found == pytest.approx([0.8, 1.6, 0.0, 0.8])
    assert reward([0], [chain("a puppy")]) == [0.0]


def test_a_judge_scores_the_readable_paths_of_a_question_in_one_call() -> None:
    asked: list[str] = []

    def reply(request: Request) -> str:
        asked.append(request.key)
        return '{"1": 80, "2": 40}' if request.key == "sum/scores" else "no scores"

    reward = judged_reward([DOG, SUM], WEIGHTS, "short", ModelJudge(FakeEngine(reply), "short"))
    found = reward([1, 1, 1, 0], [chain("16"), "unreadable", chain("16."), chain("dog")])
    assert sorted(asked) == ["dog/scores", "sum/scores"]
    assert found == pytest.approx([1.5, 0.0, 1.3, 1.1])  # a reply that cannot be read scores nobody


def test_a_model_decides_where_rules_cannot_tell() -> None:
    filter = FakeEngine(lambda request: "1")
    reward = judged_reward([DOG], WEIGHTS, "short", RuleJudge(), filter)
    assert reward([0, 0], [chain("a puppy"), chain("dog")]) == pytest.approx([1.6, 1.6])
    assert filter.requests == 1


def test_no_wrong_answer_may_earn_more_than_a_right_one() -> None:
    with pytest.raises(ParamsError, match=r"grpo\.reward: .*path <= answer"):
        parse({"reward": {"path": 2.0}}, grpo.Params, "params.yaml: grpo")
