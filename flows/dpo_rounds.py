"""The preference rounds r1 … rT as a subflow: sample, score, train, evaluate; one table in Prefect per round.

python -m flows.retrain --rounds 3        # runs it where the rounds stand in the pipeline
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.pipeline import StageInfo
from flows.walk import Walk


def rounds_of(stages: list[StageInfo]) -> dict[str, list[StageInfo]]:
    """The rounds in order, each with its stages in order."""
    names = sorted({s.round for s in stages if s.round}, key=lambda name: int(name[1:]))
    return {name: [s for s in stages if s.round == name] for name in names}


def run_rounds(walk: Walk) -> None:
    """Every round that the walk contains."""
    rounds = rounds_of(walk.stages)

    @flow(
        name="dpo-rounds", flow_run_name="dpo-rounds-{last}", persist_result=False, validate_parameters=False
    )
    def dpo_rounds(first: str, last: str) -> None:
        for name, stages in rounds.items():
            outcomes = [walk.visit(stage) for stage in stages]
            if any(outcome.did != "skipped" for outcome in outcomes):
                publish(name, walk.root)

    if rounds:
        dpo_rounds(next(iter(rounds)), list(rounds)[-1])


def publish(name: str, root: Path) -> None:
    """The figures of one round as a Prefect table."""
    rows = table(name, root)
    if rows:
        create_table_artifact(rows, key=f"round-{name}", description=f"Preference round {name}")


def table(name: str, root: Path) -> list[dict[str, Any]]:
    """Every number in the metrics of the round's stages: stage, metric, value."""
    folders = {
        "sample": root / "artifacts" / "rounds" / name / "sample",
        "score": root / "artifacts" / "rounds" / name / "score",
        "dpo": root / "artifacts" / "rounds" / name / "dpo",
        "evaluate": root / "artifacts" / "evaluate" / name,
    }
    return [
        {"stage": stage, "metric": key, "value": value}
        for stage, folder in folders.items()
        for key, value in _numbers(_metrics(folder))
    ]


def _metrics(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
