"""Benchmarks: what they compute and keep, on small fakes; none of them is run here.

pytest tests/unit/test_benchmarks.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pooling, results, systems
from benchmarks.pooling import Claim
from benchmarks.results import Row
from models.engines.base import Completion, Reply, Request
from models.engines.fake import FakeEngine
from models.prompts import prompt
from models.records import Question, ReasoningPath, Step
from models.results import ResultsError
from models.statistics import Difference
from models.vlm import Conversation
from tests.support.results_data import predictions

XEON = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor @ 2.50GHz\ncpu MHz\t\t: 2499.998\n"
THOUGHTS = "<thoughts>\nRead: row 1 is 3 5 8\nAnswer: 16\n</thoughts>"
QUESTION = Question("q", ["images/q.png"], "Sum of row 1?", "16")
PATH = ReasoningPath("q", 0, [Step("Answer", "16", "final_answer")], THOUGHTS, "sixteen", right=True)


# results


@pytest.mark.parametrize(
    ("cpuinfo", "cores", "name"),
    [
        (XEON, 2, "2-core-xeon-2.5ghz"),
        ("model name : AMD EPYC 7763 64-Core Processor\ncpu MHz : 3243.4\n", 16, "16-core-epyc-7763-3.2ghz"),
        ("model name : Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz\n", 6, "6-core-core-i7-9750h-2.6ghz"),
    ],
)
def test_a_device_is_named_in_plain_words(cpuinfo: str, cores: int, name: str) -> None:
    assert results.device(cpuinfo, cores) == name


def test_a_device_without_cpuinfo_still_has_a_name() -> None:
    assert results.device("", 4).startswith("4-core-")


def test_a_command_names_no_place_on_this_machine(tmp_path: Path) -> None:
    words = [
        str(tmp_path / "benchmarks/ablation.py"),
        "--from-artifacts",
        str(tmp_path / "runs/a"),
        "/else/b",
    ]
    assert results.command(words, tmp_path) == "python -m benchmarks.ablation --from-artifacts runs/a b"


def test_results_are_saved_as_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "commit", lambda root=None: "abc")
    rows = [Row("gain", 7.5, "points", "≥ 7", True), Row("accuracy", 60.0, "%")]
    path = results.save("ablation", rows, [results.row_table("ablation", rows)], "python -m x", tmp_path)
    assert path.name == f"ablation-{results.device()}.json"
    found = json.loads(path.read_text())
    assert list(found) == ["name", "device", "command", "commit", "rows"]
    assert found["rows"][1] == {"what": "accuracy", "value": 60.0, "unit": "%", "target": None, "holds": None}
    assert "| gain | 7.5 | points | ≥ 7 | yes |" in path.with_suffix(".md").read_text()
    assert "accuracy" not in path.with_suffix(".md").read_text()  # has no target


def test_a_missed_target_shows_in_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert results.finish("x", [Row("gain", 7.5, "points", "≥ 7", True)], [], False) == 0
    assert results.finish("x", [Row("gain", 6.5, "points", "≥ 7", False)], [], False) == 1
    assert "does not hold:\n  gain" in capsys.readouterr().out


# systems


def test_direct_sft_learns_reasoning_and_truth_in_one_go() -> None:
    (row,) = systems.conversations("direct_sft", "short", {"q": QUESTION}, [PATH])
    assert row.images == QUESTION.images
    assert row.turns == [("Sum of row 1? Think:", THOUGHTS + "\n16")]


def test_multi_turn_learns_reasoning_then_truth() -> None:
    (row,) = systems.conversations("multi_turn", "short", {"q": QUESTION}, [PATH])
    assert row.turns == [("Sum of row 1? Think:", THOUGHTS), (prompt("short", "answer"), "16")]


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        (THOUGHTS + "\n16", THOUGHTS, "16"),
        (THOUGHTS, THOUGHTS, ""),
        ("16", None, ""),
        ("", None, ""),
    ],
)
def test_the_answer_stands_after_the_reasoning(text: str, reasoning: str | None, answer: str) -> None:
    assert systems.split_answer(text) == (reasoning, answer)


def test_an_answer_in_one_go_says_why_it_failed() -> None:
    def said(text: str) -> tuple[str, str | None]:
        engine = FakeEngine(lambda request: text)
        found = asyncio.run(systems.answer_in_one_go(engine, QUESTION, "short", 99))
        return found.answer, found.failure

    assert said(THOUGHTS + "\n16") == ("16", None)
    assert said(THOUGHTS) == ("", "no answer")
    assert said("16") == ("", "no thoughts frame")


class Turns:
    """An engine that reasons on a first turn and answers on a second; keeps what it was asked."""

    capacity, independent = 8, True

    def __init__(self, reasoning: str, finished: bool = True) -> None:
        self.reasoning, self.finished = reasoning, finished
        self.asked: list[tuple[Conversation, int]] = []

    async def ask(self, request: Request) -> Reply:
        self.asked.append((request.prompt, request.sampling.max_new_tokens))
        first = Completion(self.reasoning, 9, self.finished)
        return first if len(request.prompt.turns) == 1 else Completion(" 16", 1, True)

    async def close(self) -> None: ...


def test_two_turns_ask_with_the_models_own_reasoning_and_the_picture() -> None:
    engine = Turns(THOUGHTS)
    said = asyncio.run(systems.answer_in_two_turns(engine, QUESTION, "short", 50, 5))
    assert (said.answer, said.reasoning, said.reasoning_tokens, said.failure) == ("16", THOUGHTS, 9, None)
    (_, first), (second, last) = engine.asked
    assert (first, last) == (50, 5) and second.images == QUESTION.images
    assert second.turns == [("Sum of row 1? Think:", THOUGHTS), (prompt("short", "answer"), "")]


@pytest.mark.parametrize(
    ("reasoning", "finished", "answer", "failure"),
    [("<thoughts>\nRead: 3", False, "16", "reasoning cut off"), ("", True, "", "no thoughts frame")],
)
def test_two_turns_count_reasoning_that_failed(
    reasoning: str, finished: bool, answer: str, failure: str
) -> None:
    said = asyncio.run(systems.answer_in_two_turns(Turns(reasoning, finished), QUESTION, "short", 50, 5))
    assert (said.answer, said.failure) == (answer, failure)


def test_the_reasoner_alone_answers_with_its_last_step() -> None:
    rows = [
        {"id": "a", "answer": "7", "right": True, "reasoning_answer": "8", "reasoning_right": False},
        {"id": "b", "answer": "7", "right": False, "reasoning_answer": "9", "reasoning_right": True},
        {"id": "c", "answer": "7", "right": True, "reasoning_answer": None, "reasoning_right": None},
    ]
    alone = systems.reasoner_alone(rows)
    assert [(row["answer"], row["right"]) for row in alone] == [("8", False), ("9", True), (None, False)]
    assert rows[0]["right"] is True


# pooling

ROUNDS = ["r1", "r2"]
LEVELS = {"base": 0.40, "summary_only": 0.42, "direct_sft": 0.45, "multi_turn": 0.47, "multi_agent": 0.50}
LEVELS |= {"r1": 0.55, "r2": 0.60, "reasoner_only@multi_agent": 0.5, "reasoner_only@r1": 0.5}
LEVELS |= {"reasoner_only@r2": 0.5}


def pool(seeds: int = 2, **changed: float) -> dict[int, dict[str, Any]]:
    """Predictions of every system; seed K is K points better throughout."""
    levels = {**LEVELS, **changed}
    return {
        seed: {name: predictions(level + seed / 100) for name, level in levels.items()}
        for seed in range(seeds)
    }


def test_pooling_averages_the_seeds_and_counts_a_question_once() -> None:
    found = pooling.accuracy(pool(), "base", "reasoning")
    assert found.mean == pytest.approx(0.405) and found.n == 400
    one = pooling.accuracy(pool(1), "base", "reasoning")
    assert (one.mean, one.n) == (pytest.approx(0.40), 400)
    assert found.high - found.low == pytest.approx(
        one.high - one.low, rel=0.1
    )  # no narrower for being repeated


def test_a_pooled_difference_is_paired_by_question() -> None:
    data = pool()
    for system in data[1].values():
        system.reverse()
    found = pooling.difference(data, "r2", "base", "reasoning")
    assert found.mean == pytest.approx(0.20) and found.n == 400
    assert found.low > 0.15


def test_seeds_that_answered_other_questions_are_refused() -> None:
    data = pool()
    data[1]["base"] = predictions(0.4, ids="other-")
    with pytest.raises(ResultsError, match="base: the seeds did not answer the same reasoning questions"):
        pooling.accuracy(data, "base", "reasoning")
    with pytest.raises(ResultsError, match="r1 and base did not answer"):
        pooling.difference({1: data[1]}, "r1", "base", "reasoning")


@pytest.mark.parametrize(
    ("rounds", "pairs"),
    [
        ([], []),
        (["r1"], [("r1", "multi_agent")]),
        (["r1", "r2", "r3"], [("r1", "multi_agent"), ("r3", "r1")]),
    ],
)
def test_the_claims_follow_the_rounds(rounds: list[str], pairs: list[tuple[str, str]]) -> None:
    made = pooling.claims(rounds)
    last = rounds[-1] if rounds else "multi_agent"
    assert made[0] == Claim(last, "base", bound=7, strict=False) and made[0].target == "≥ +7"
    assert [(c.better, c.worse) for c in made if c.figure == "low"] == pairs
    assert made[-1] == Claim(last, "base", "perception", bound=-1, strict=False)
    assert made[-1].target == "≥ −1" and made[1].target == "> 0"
    assert all(claim.target == "low end > 0" for claim in made if claim.figure == "low")


@pytest.mark.parametrize(
    ("claim", "difference", "holds"),
    [
        (Claim("r3", "base", bound=7, strict=False), (0.07, 0.05, 0.09), True),
        (Claim("r3", "base", bound=7, strict=False), (0.0699, 0.05, 0.09), False),
        (Claim("r1", "multi_agent", figure="low"), (0.02, 0.0, 0.04), False),
        (Claim("r1", "multi_agent", figure="low"), (0.02, 0.001, 0.04), True),
        (Claim("r3", "base", "perception", bound=-1, strict=False), (-0.01, -0.02, 0.0), True),
        (Claim("r3", "base", "perception", bound=-1, strict=False), (-0.0101, -0.02, 0.0), False),
        (Claim("b", "a"), (None, None, None), False),
    ],
)
def test_a_claim_holds_up_to_its_bound(claim: Claim, difference: tuple, holds: bool) -> None:
    assert claim.holds(Difference(*difference, p=0.5, n=10)) is holds


def test_rows_judge_all_seeds_together_and_only_show_each() -> None:
    rows = pooling.claim_rows(pool(), ROUNDS)
    judged = [row for row in rows if row.target]
    assert len(judged) == len(pooling.claims(ROUNDS)) and len(rows) == 3 * len(judged)
    assert all(row.holds for row in judged) and not any(row.holds for row in rows if not row.target)
    assert judged[0].what.startswith("r2 − base on reasoning, 2 seeds (mean +20.00, paired 95% interval +")
    assert judged[0].value == pytest.approx(20.0)
    worse = pooling.claim_rows(pool(r1=0.49), ROUNDS)
    assert [row.what.split(",")[0] for row in worse if row.holds is False] == [
        "low end of r1 − multi_agent on reasoning"
    ]


def test_every_system_stands_in_the_table_with_every_seed() -> None:
    table = pooling.accuracy_table(pool(), ROUNDS, "reasoning")
    assert table.head == ("System", "2 seeds", "seed 0", "seed 1")
    assert [row[0] for row in table.rows] == [
        "Base, answers directly",
        "Summary agent only",
        "Direct SFT",
        "Multi-turn",
        "Reasoning agent only",
        "Reasoning agent only, round 1",
        "Reasoning agent only, round 2",
        "Multi-agent",
        "Multi-agent, round 1",
        "Multi-agent, round 2",
    ]
    assert table.rows[0][2].startswith("40.0 (")
    assert [row[-1] for row in pooling.claim_table(pool(1), ROUNDS).rows] == ["yes"] * 8
    assert len(pooling.accuracy_rows(pool(), ROUNDS)) == 10 * 3 * 2
