"""The walk over the stages: which it runs, which it skips, and how often it asks DVC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import pipeline, walk
from flows.pipeline import StageInfo, StageState
from flows.stage import Outcome

CODE, INPUT = "code.py", "a/out/rows.jsonl"


@pytest.mark.parametrize(
    ("stale", "why", "asked"),
    [
        ("", CODE, [4]),  # nothing to do: one question
        ("abcd", CODE, [4]),  # all of them run, whatever the one before made
        ("abcd", INPUT, [4, 1, 1, 1]),  # each may be up to date again when its turn comes
        ("a", CODE, [4, 1, 4]),  # up to date again: all are asked about at once
        ("ac", CODE, [4, 1, 4, 1, 4]),
    ],
)
def test_every_stale_stage_runs_and_dvc_is_asked_no_more_than_needed(
    stale: str, why: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, asks, ran = set(stale), [], []

    def states(root: Path, names: list[str]) -> dict[str, StageState]:
        asks.append(len(names))
        return {
            n: StageState(n, pipeline.STALE, ((why, "modified"),))
            if n in waiting
            else StageState(n, pipeline.UP_TO_DATE)
            for n in names
        }

    def run_stage(name: str, reason: str | None, *rest: Any) -> Outcome | None:
        if reason is None:
            return None
        waiting.discard(name)
        ran.append(name)
        return Outcome(name, "ran", 1.0)

    class Parent:
        def id(self) -> None:
            return None

    monkeypatch.setattr(pipeline, "states", states)
    monkeypatch.setattr(pipeline, "state", lambda root, name: states(root, [name])[name])
    monkeypatch.setattr(walk, "run_stage", run_stage)
    stages = [StageInfo(n, n, (f"{n}/out",), frozenset("abcd"[:place])) for place, n in enumerate("abcd")]
    found = states(Path(), list("abcd"))
    walked = walk.Walk(Path(), stages, found, Parent(), 1.0)  # type: ignore[arg-type]
    for stage in stages:
        walked.visit(stage)
    assert ran == list(stale) == walked.did("ran")
    assert asks == asked
