"""The gate: does the best generation become champion? Decides, says why, and sets the MLflow alias.

    python -m tasks.promote             # the stage: decide, write artifacts/promote/decision.json, set alias
    python -m tasks.promote --apply     # only set the alias to what decision.json says (after `dvc checkout`)

The candidate is the generation with the highest accuracy on VALIDATION reasoning; test never chooses. It is
promoted over the champion (over base, before there is one) if the paired 95% interval of the difference on
test reasoning lies above zero and test perception does not fall by more than `perception_margin`.

decision.json holds no run id and no time. The champion comes from the registry, so it is an input of the
decision that DVC does not see; once the candidate is champion itself, the comparison that promoted it is
repeated, and a second execution writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models import results
from models.records import read_jsonl
from tasks import params, tracking
from tasks.registry import Agents, Registry, Version
from tasks.stage import StageError, open_stage, round_floats, write_json

COMPARE, EVALUATE, OUT = Path("artifacts/compare"), Path("artifacts/evaluate"), Path("artifacts/promote")
BASE = "base"


@dataclass(frozen=True)
class Params:
    """perception_margin: allowed loss of perception accuracy, as a share (0.01 is one point)."""

    perception_margin: float = 0.01
    resamples: int = 10_000
    model: str = tracking.REGISTERED_MODEL
    alias: str = "champion"


@dataclass(frozen=True)
class Opponent:
    """Whom the candidate must beat. `over` names it in the registry: a version number, or "base"."""

    name: str
    predictions: results.Rows
    over: str = BASE
    agents: Agents | None = None
    note: str = ""


def choose(comparison: Mapping[str, Any]) -> tuple[str, dict[str, float | None]]:
    """The generation that is best on validation reasoning (the earlier on a tie), and each one's accuracy.

    Without validation questions the newest generation is the candidate: still no test question chooses.
    """
    shares = {
        name: comparison["systems"][name]["accuracy"]["validation"]["mean"]
        for name in comparison["order"]
        if name != BASE
    }
    if not shares:
        raise StageError("nothing to promote: the comparison holds no generation. Run `dvc repro compare`.")
    known = {name: share for name, share in shares.items() if share is not None}
    return (max(known, key=known.__getitem__) if known else list(shares)[-1]), shares


def run(
    comparison: Mapping[str, Any],
    candidate_predictions: results.Rows,
    opponent: Opponent,
    *,
    agents: Agents | None,
    perception_margin: float,
    resamples: int,
) -> dict[str, Any]:
    """The decision, with the figures it rests on and its reason in words."""
    candidate, validation = choose(comparison)
    figures = {
        name: results.difference(
            results.select(candidate_predictions, name),
            results.select(opponent.predictions, name),
            resamples=resamples,
        )
        for name in ("reasoning", "perception")
    }
    better = figures["reasoning"]["n"] > 0 and figures["reasoning"]["low"] > 0
    kept = figures["perception"]["n"] == 0 or figures["perception"]["mean"] >= -perception_margin
    return round_floats(
        {
            "decision": "promote" if better and kept else "keep",
            "candidate": candidate,
            "candidate_agents": asdict(agents) if agents else None,
            "opponent": opponent.name,
            "opponent_agents": asdict(opponent.agents) if opponent.agents else None,
            "validation": validation,
            "perception_margin": perception_margin,
            **figures,
            "reason": _reason(candidate, opponent, figures, (better, kept), perception_margin),
        }
    )


def _reason(
    candidate: str, opponent: Opponent, figures: Mapping[str, Any], passed: tuple[bool, bool], margin: float
) -> str:
    reasoning, perception = figures["reasoning"], figures["perception"]
    if not reasoning["n"]:
        return f"{candidate} is not promoted: there are no reasoning test questions to judge it by."
    gain = (
        f"{100 * reasoning['mean']:+.1f} points on reasoning against {opponent.name} (95% interval "
        f"{100 * reasoning['low']:+.1f} to {100 * reasoning['high']:+.1f}, {reasoning['n']:,} questions)"
    )
    better, kept = passed
    if perception["n"]:
        change = (
            f"perception changes by {100 * perception['mean']:+.1f} points, {100 * margin:.1f} may be lost"
        )
    else:
        change = "there are no perception questions"
    if better and kept:
        text = f"{candidate} is promoted: {gain}; {change}."
    elif better:
        text = f"{candidate} is not promoted although it gains {gain}: {change}."
    else:
        text = f"{candidate} is not promoted: {gain} is within noise or a loss; {change}."
    return " ".join(filter(None, [text, opponent.note]))


def find_opponent(
    candidate: Agents | None, asked: set[tuple], base: results.Rows, registry: Registry | None
) -> Opponent:
    """The champion; or what the candidate was promoted over, if it is the champion already; or base."""
    version = registry.champion() if registry else None
    if registry and version and version.agents == candidate:
        version = None if version.over == BASE else registry.version(version.over)
    if registry is None or version is None:
        return Opponent(BASE, base)
    predictions = registry.predictions(version)
    if predictions is None:
        raise StageError(
            f"the answers of {_title(version)} are gone from MLflow: nothing can be compared with it. "
            "Bring its artifacts back, or delete the alias to let the gate start over at base."
        )
    if _questions(predictions) != asked:
        note = f"The champion (version {version.number}, {version.generation}) answered other questions."
        return Opponent(BASE, base, over=BASE, note=note)
    return Opponent(_title(version), predictions, version.number, version.agents)


def _questions(rows: results.Rows) -> set[tuple]:
    """The test questions answered: ids alone may name other questions after the data has changed."""
    return {(row["id"], row["question"], row["truth"]) for row in rows if row["split"] == "test"}


def _title(version: Version) -> str:
    return f"champion {version.generation} (version {version.number})"


def agents_of(system: str) -> Agents | None:
    """The agents that a system was evaluated with, from its manifest; None without one."""
    path = EVALUATE / system / "manifest.json"
    if not path.exists():
        return None
    inputs: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["inputs"]
    parts = "reasoning_sft" if system == "multi_agent" else f"rounds/{system}/dpo", "summary_sft"
    found = [next((md5 for name, md5 in inputs.items() if part in name), None) for part in parts]
    if None in found:
        raise StageError(f"{path} names no checkpoint of {' and '.join(parts)}: evaluate {system} again")
    return Agents(*map(str, found))


def apply(decision: Mapping[str, Any], registry: Registry, over: str) -> Version | None:
    """Make the registry say what the decision says; repeating it changes nothing."""
    if decision["decision"] != "promote" or not decision["candidate_agents"]:
        return registry.champion()
    predictions = EVALUATE / decision["candidate"] / "predictions.jsonl"
    return registry.promote(decision["candidate"], Agents(**decision["candidate_agents"]), predictions, over)


def _predictions(system: str) -> list[dict[str, Any]]:
    return list(read_jsonl(EVALUATE / system / "predictions.jsonl"))


def decide(settings: Params, registry: Registry | None) -> tuple[dict[str, Any], Opponent]:
    """The decision on this checkout's comparison, against this registry's champion."""
    comparison = json.loads((COMPARE / "comparison.json").read_text(encoding="utf-8"))
    candidate, _ = choose(comparison)
    predictions, agents = _predictions(candidate), agents_of(candidate)
    opponent = find_opponent(agents, _questions(predictions), _predictions(BASE), registry)
    decision = run(
        comparison,
        predictions,
        opponent,
        agents=agents,
        perception_margin=settings.perception_margin,
        resamples=settings.resamples,
    )
    return decision, opponent


def stage(settings: Params) -> dict[str, Any]:
    """Decide, write decision.json, and set the alias."""
    registry = Registry(settings.model, settings.alias) if tracking.enabled() else None
    order = json.loads((COMPARE / "comparison.json").read_text(encoding="utf-8"))["order"]
    inputs = [COMPARE, *(EVALUATE / name for name in order)]
    with open_stage("promote", params=settings, inputs=inputs, out=OUT) as current:
        decision, opponent = decide(settings, registry)
        write_json(current.out / "decision.json", decision)
        current.artifact(current.out / "decision.json")
        current.log_metrics({f"{key}/{part}": decision[key][part] or 0.0 for key, part in _LOGGED})
        if registry:
            apply(decision, registry, opponent.over)
    return decision


def apply_written(settings: Params) -> dict[str, Any]:
    """Set the alias to what decision.json says: DVC restores the file, and knows nothing of the registry."""
    decision: dict[str, Any] = json.loads((OUT / "decision.json").read_text(encoding="utf-8"))
    if tracking.enabled():
        registry = Registry(settings.model, settings.alias)
        champion = registry.champion()
        apply(decision, registry, champion.number if champion else BASE)
    return decision


_LOGGED = [(key, part) for key in ("reasoning", "perception") for part in ("mean", "low", "high")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage on this checkout, or only apply its decision."""
    parser = argparse.ArgumentParser(description="Decide whether the best generation becomes champion.")
    parser.add_argument("--apply", action="store_true", help="set the alias to what decision.json says")
    settings = params.load("promote", Params)
    decision = apply_written(settings) if parser.parse_args(arguments).apply else stage(settings)
    print(decision["reason"])


if __name__ == "__main__":
    main()
