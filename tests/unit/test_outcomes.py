"""Chains are written as they come: whole files or none, the form of a record, one chain held at a time.

pytest tests/unit/test_outcomes.py
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from models.engines.base import Request, Sampling
from models.engines.fake import FakeEngine
from models.engines.journalled import request_key
from models.reasoning import Settings, progressive_chain
from models.records import FailedPath, Question, ReasoningPath, Step, jsonl_writer, read_jsonl, to_json
from models.vlm import Conversation
from tasks.outcomes import Outcomes
from tasks.sampling import AT_ONCE, sample_chains

PATH = ReasoningPath("q", 0, [Step("Read", "é → {x}"), Step("Answer", "7", "final_answer")], "t", "7")
FAILED = FailedPath("q", 1, "not JSON", "half {", [Step("Read", "a")])


@pytest.mark.parametrize(
    "record",
    [
        PATH,
        replace(PATH, oracle={"rows": [[1, 2], [3]], "of": None}),
        FAILED,
        Question("q", ["a.png"], "?", "7", choices=["a", "b"], annotation={"grid": [[1.5]], "all": (1, 2)}),
    ],
)
def test_a_record_as_a_dict_is_what_dataclasses_make_of_it_and_shares_nothing(record: Any) -> None:
    row = to_json(record)
    assert row == asdict(record) and list(row) == list(asdict(record))
    for name, value in row.items():
        assert isinstance(value, str | int | type(None)) or value is not getattr(record, name)


def test_a_file_written_row_by_row_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with jsonl_writer(tmp_path / "a.jsonl") as write:
        write(PATH)
        write({"x": 1})
        assert not (tmp_path / "a.jsonl").exists()
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [asdict(PATH), {"x": 1}]
    with pytest.raises(RuntimeError), jsonl_writer(tmp_path / "b.jsonl") as write:
        write(PATH)
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_outcomes_are_counted_and_go_to_two_files(tmp_path: Path) -> None:
    with Outcomes(tmp_path) as outcomes:
        for record in (PATH, FAILED, PATH, replace(FAILED, reason="cut off")):
            outcomes.add(to_json(record))
    assert (outcomes.paths, outcomes.chains, outcomes.steps) == (2, 4, {2: 2})
    assert outcomes.reasons == {"cut off": 1, "not JSON": 1}
    assert len(list(read_jsonl(tmp_path / "paths.jsonl"))) == 2
    assert [row["reason"] for row in read_jsonl(tmp_path / "failures.jsonl")] == ["not JSON", "cut off"]


def test_outcomes_of_a_failed_stage_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Outcomes(tmp_path) as outcomes:
        outcomes.add(to_json(PATH))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_chains_are_given_on_while_others_are_still_to_begin(tmp_path: Path) -> None:
    engine, settings, begun = FakeEngine(batch_size=4), Settings(prompts="short", min_steps=1), []
    questions = [Question(str(n), [], "?", "7") for n in range(200)]
    begun_at: list[int] = []

    async def chain(engine: Any, question: Question, sample: int) -> ReasoningPath | FailedPath:
        begun.append(question.id)
        return await progressive_chain(engine, question, sample, settings, 0)

    given: list[Any] = []

    def take(row: Any) -> None:
        given.append((row["question_id"], row["sample"]))
        begun_at.append(len(begun))

    sample_chains(engine, questions, 2, chain, [], 8, tmp_path, take)
    assert given == [(q.id, sample) for q in questions for sample in range(2)]
    assert max(at - n for n, at in enumerate(begun_at)) <= 8 * AT_ONCE * 4


def test_a_request_is_known_by_all_that_may_change_its_reply() -> None:
    sampling = Sampling(0.7, 0.95, 1.05, 64, 2**63 - 1)
    asked = Request("q/0/1.0", Conversation(["a.png"], [("Sum?", "")]), sampling, {"type": "object"})
    others = [
        replace(asked, key="q/0/1.1"),
        replace(asked, prompt=Conversation(["b.png"], [("Sum?", "")])),
        replace(asked, prompt=Conversation(["a.png"], [("Sum?", "7"), ("", "")])),
        replace(asked, prompt=Conversation(["a.png"], [("\ud83d", "")])),  # half a surrogate pair
        replace(asked, sampling=replace(sampling, seed=1)),
        replace(asked, schema=None),
    ]
    assert len({request_key(request) for request in [asked, *others]}) == 7
    again = replace(asked, prompt=Conversation(("a.png",), (("Sum?", ""),)), goes_on=True)
    assert request_key(again) == request_key(asked)
    assert request_key(others[3]) == request_key(replace(others[3]))
