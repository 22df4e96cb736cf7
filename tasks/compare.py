"""Compare every system on held-out questions: intervals, paired tests, the 2x2, length, families, rounds.

    python -m tasks.compare

Reads artifacts/evaluate/<system>/predictions.jsonl of base, multi_agent and the rounds of params.yaml
(leftovers of rounds that are no longer in it are ignored) and artifacts/rounds/<round>/score/metrics.json.
Writes artifacts/compare/comparison.json and table.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import results
from models.records import read_jsonl
from tasks import params
from tasks.stage import open_stage, round_floats, write_json

FIRST_SYSTEMS = ("base", "multi_agent")
EVALUATE, ROUNDS, OUT = Path("artifacts/evaluate"), Path("artifacts/rounds"), Path("artifacts/compare")
ROUND_FACTS = ("questions", "paths", "failed", "right_share", "reward", "length", "pairs", "agreement")


@dataclass(frozen=True)
class Params:
    """resamples: bootstrap resamples of every paired difference."""

    resamples: int = 10_000


def run(
    predictions: Mapping[str, results.Rows],
    rounds: Mapping[str, Mapping[str, Any]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The comparison of `predictions` by system, in order: each system's predecessor is the one before it."""
    names = list(predictions)
    sets = {name: {key: results.select(predictions[name], key) for key in results.SETS} for name in names}
    systems = {}
    for index, name in enumerate(names):
        others = {"base": names[0], "previous": names[index - 1]} if index else {}
        systems[name] = {
            "accuracy": {key: results.accuracy(rows) for key, rows in sets[name].items()},
            "against": {
                label: {"system": other, **_differences(sets[name], sets[other], resamples, seed)}
                for label, other in others.items()
            },
            "two_by_two": results.two_by_two(sets[name]["reasoning"]),
            "reasoning_tokens": results.mean_length(sets[name]["reasoning"]),
            "families": results.by_family(sets[name]["reasoning"]),
        }
    facts = {name: {key: rounds[name].get(key) for key in ROUND_FACTS} for name in rounds}
    return round_floats({"order": names, "systems": systems, "rounds": facts})


def _differences(
    own: Mapping[str, results.Rows], other: Mapping[str, results.Rows], resamples: int, seed: int
) -> dict[str, Any]:
    return {key: results.difference(own[key], other[key], resamples=resamples, seed=seed) for key in own}


def load_predictions(systems: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The predictions of each system, in the order given."""
    return {name: list(read_jsonl(EVALUATE / name / "predictions.jsonl")) for name in systems}


def main() -> None:
    """Run the stage on this checkout."""
    settings, rounds = params.load("compare", Params), list(params.read()["rounds"])
    systems = [*FIRST_SYSTEMS, *rounds]
    scores = [ROUNDS / name / "score" / "metrics.json" for name in rounds]
    inputs = [*(EVALUATE / name for name in systems), *scores]
    with open_stage("compare", params=settings, inputs=inputs, out=OUT) as stage:
        facts = {name: json.loads(path.read_text("utf-8")) for name, path in zip(rounds, scores, strict=True)}
        found = run(load_predictions(systems), facts, resamples=settings.resamples, seed=params.seed())
        write_json(stage.out / "comparison.json", found)
        text = results.table(found)
        (stage.out / "table.md").write_text(text, encoding="utf-8")
        for name in systems:
            shares = found["systems"][name]["accuracy"]
            stage.log_metrics({f"{name}/{key}": share["mean"] for key, share in shares.items() if share["n"]})
        stage.artifact(stage.out / "comparison.json")
        stage.artifact(stage.out / "table.md")
    print(text)


if __name__ == "__main__":
    main()
