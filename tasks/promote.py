"""The gate: should the best generation become champion? Decides and says why; changes nothing in MLflow.

    python -m tasks.promote             # the stage: decide, write artifacts/promote/decision.json
    python -m tasks.promote --apply     # carry decision.json out: register the candidate, set the alias

`longview run` carries the decision out at its end, when what it was made on is in the DVC remote and the run
is a version in git. `--apply` is for a `dvc repro` or `dvc checkout` by hand.

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
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models import results
from models.records import read_jsonl
from tasks import params, promotion, tracking
from tasks.fingerprint import fingerprint
from tasks.promotion import Approval, Candidate, Outcome
from tasks.registry import BASE, Agents, Registry, Version
from tasks.stage import StageError, data_version, open_stage, plain, round_floats, write_json

COMPARE, EVALUATE, OUT = Path("artifacts/compare"), Path("artifacts/evaluate"), Path("artifacts/promote")
DECISION = OUT / "decision.json"


@dataclass(frozen=True)
class Params:
    """perception_margin: allowed loss of perception accuracy, as a share (0.01 is one point).
    approval: whether a person must agree; it changes no decision."""

    perception_margin: float = 0.01
    resamples: int = 10_000
    model: str = tracking.REGISTERED_MODEL
    alias: str = "champion"
    approval: Approval | None = None


@dataclass(frozen=True)
class Opponent:
    """Whom the candidate must beat. `agents`: of the champion, also if its answers cannot be compared."""

    name: str
    predictions: results.Rows
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
        text = f"{candidate} passes the gate: {gain}; {change}."
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
        return Opponent(BASE, base, version.agents, note)
    return Opponent(_title(version), predictions, version.agents)


def _questions(rows: results.Rows) -> set[tuple]:
    """The test questions answered: ids alone may name other questions after the data has changed."""
    return {(row["id"], row["question"], row["truth"]) for row in rows if row["split"] == "test"}


def _title(version: Version) -> str:
    return f"champion {version.generation} (version {version.number})"


def agents_of(system: str) -> Agents | None:
    """The agents that a system was evaluated with, from its manifest; None without one."""
    found = _checkpoints(system)
    return Agents(*(md5 for _, md5 in found)) if found else None


def outputs_of(system: str) -> dict[str, str]:
    """The md5s under which DVC has the outputs of the stages that made a system's checkpoints."""
    folders = {
        f"{agent}_out": path.parent if path.name == "checkpoint" else path
        for agent, (path, _) in zip(("reasoning", "summary"), _checkpoints(system), strict=False)
    }
    return {tag: fingerprint(folder) for tag, folder in folders.items() if folder.is_dir()}


def _checkpoints(system: str) -> list[tuple[Path, str]]:
    """Path and md5 of the reasoning agent's and the summary agent's checkpoint; empty without a manifest."""
    path = EVALUATE / system / "manifest.json"
    if not path.exists():
        return []
    inputs: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["inputs"]
    parts = "reasoning_sft" if system == "multi_agent" else f"rounds/{system}/dpo", "summary_sft"
    found = [[(Path(name), md5) for name, md5 in inputs.items() if part in name] for part in parts]
    if not all(found):
        raise StageError(f"{path} names no checkpoint of {' and '.join(parts)}: evaluate {system} again")
    return [matches[0] for matches in found]


def _predictions(system: str) -> list[dict[str, Any]]:
    return list(read_jsonl(EVALUATE / system / "predictions.jsonl"))


def decide(settings: Params, registry: Registry | None) -> dict[str, Any]:
    """The decision on this checkout's comparison, against this registry's champion."""
    comparison = json.loads((COMPARE / "comparison.json").read_text(encoding="utf-8"))
    candidate, _ = choose(comparison)
    predictions, agents = _predictions(candidate), agents_of(candidate)
    opponent = find_opponent(agents, _questions(predictions), _predictions(BASE), registry)
    return run(
        comparison,
        predictions,
        opponent,
        agents=agents,
        perception_margin=settings.perception_margin,
        resamples=settings.resamples,
    )


def stage(settings: Params) -> dict[str, Any]:
    """Decide and write decision.json."""
    registry = Registry(settings.model, settings.alias) if tracking.enabled() else None
    order = json.loads((COMPARE / "comparison.json").read_text(encoding="utf-8"))["order"]
    inputs = [COMPARE, *(EVALUATE / name for name in order)]
    obeyed = {name: value for name, value in plain(settings).items() if name != "approval"}
    with open_stage("promote", params=obeyed, inputs=inputs, out=OUT) as current:
        decision = decide(settings, registry)
        write_json(current.out / DECISION.name, decision)
        current.artifact(current.out / DECISION.name)
        current.log_metrics({f"{key}/{part}": decision[key][part] or 0.0 for key, part in _LOGGED})
    return decision


def apply(
    settings: Params, *, version: Mapping[str, str | None] | None = None, prefect_run: str | None = None
) -> Outcome | None:
    """Carry out this checkout's decision.json; repeating it changes nothing.

    version: tags of the run as a version (`run`, `commit`). None: tracking is off, or the decision names no
    checkpoints to register.
    """
    decision: dict[str, Any] = json.loads(DECISION.read_text(encoding="utf-8"))
    if not tracking.enabled() or not decision["candidate_agents"]:
        return None
    comparison = json.loads((COMPARE / "comparison.json").read_text(encoding="utf-8"))
    name = decision["candidate"]
    candidate = Candidate(
        name,
        Agents(**decision["candidate_agents"]),
        EVALUATE / name / "predictions.jsonl",
        {
            "data_version": data_version({}) or None,
            **promotion.facts(decision, comparison),
            **outputs_of(name),
            **(version or {}),
        },
    )
    registry = Registry(settings.model, settings.alias)
    return promotion.settle(registry, decision, candidate, settings.approval, prefect_run)


_LOGGED = [(key, part) for key in ("reasoning", "perception") for part in ("mean", "low", "high")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage on this checkout, or carry its decision out."""
    parser = argparse.ArgumentParser(description="Decide whether the best generation becomes champion.")
    parser.add_argument("--apply", action="store_true", help="register the candidate and set the alias")
    settings = params.load("promote", Params)
    if parser.parse_args(arguments).apply:
        done = apply(settings)
        print(done.sentence if done else "nothing to register: tracking is off, or there is no checkpoint")
        if done and done.state == "waiting":
            print("`longview model approve --reason …`, or with --reject")
        return
    print(stage(settings)["reason"])
    if tracking.enabled() and "LONGVIEW_PARENT_RUN_ID" not in os.environ:
        print("MLflow is unchanged: `longview run`, or `python -m tasks.promote --apply`, carries this out")


if __name__ == "__main__":
    main()
