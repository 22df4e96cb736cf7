"""The walk over the stages: which it runs, which it skips, and how often it asks DVC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import pipeline, walk
from flows.pipeline import StageInfo, StageState
from flows.stage import Outcome


@pytest.mark.parametrize(
    ("stale", "asked"),
    [
        ("", [4]),  # nothing to do: one question
        ("abcd", [4, 1, 1, 1]),  # everything runs: each is asked about when its turn comes
        ("a", [4, 1, 4]),  # up to date again: the rest is asked about at once
        ("ac", [4, 1, 4, 1, 4]),
    ],
)
def test_every_stale_stage_runs_and_dvc_is_asked_no_more_than_needed(
    stale: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, asks, ran = set(stale), [], []

    def states(root: Path, names: list[str]) -> dict[str, StageState]:
        asks.append(len(names))
        return {
            n: StageState(n, pipeline.STALE if n in waiting else pipeline.UP_TO_DATE, "code modified")
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
    monkeypatch.setattr(walk, "run_stage", run_stage)
    stages = [StageInfo(name, name, (), frozenset()) for name in "abcd"]
    walked = walk.Walk(Path(), stages, Parent(), 1.0)  # type: ignore[arg-type]
    for stage in stages:
        walked.visit(stage)
    assert ran == list(stale) == walked.did("ran")
    assert asks == asked
