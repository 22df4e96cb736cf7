"""Generations and runs side by side: accuracy, paired differences, rounds, data, and what flipped.

    longview compare                                    # this checkout's generations
    longview compare run/20261101-1a2b3c4d latest       # the best generation of each run
    python -m flows.compare

The figures of an earlier run are in its commit (metrics/), its answers in DVC's cache or the remote; nothing
of the working tree is touched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from ruamel.yaml import YAML

from flows import data, objects, registered, versions
from flows.environment import root as find_root
from flows.objects import Objects
from flows.versions import RunVersion
from flows.walk import say
from tasks.side_by_side import (
    HEAD,
    WORKSPACE,
    Champion,
    Comparison,
    Generation,
    answers,
    cells,
    lines,
    markdown,
    verdict,
)

EVALUATE, PREDICTIONS = "artifacts/evaluate", "predictions.jsonl"
CHECKPOINTS = (
    "artifacts/foundation/",
    "artifacts/reasoning_sft/",
    "artifacts/summary_sft/",
    "artifacts/rounds/",
)
COMPARISON, DECISION = Path("artifacts/compare/comparison.json"), Path("artifacts/promote/decision.json")


class CompareError(ValueError):
    """There is nothing to compare; the message says what to do."""


@flow(name="compare", persist_result=False)
def compare(runs: list[str] | None = None, rounds: bool = False) -> dict[str, Any]:
    """Generations side by side, as artifacts of this flow run.

    Args:
        runs: Tags of runs, git revisions or `latest`; this checkout if left out.
        rounds: Every round of each run, not its best generation alone.
    """
    found = make(find_root(), runs or [], rounds=rounds, unknown=say)
    table = [dict(zip(HEAD, cells(row), strict=True)) for row in found.rows]
    create_table_artifact(table, key="generations", description=found.verdict)
    create_markdown_artifact(markdown(found), key="compare", description=found.verdict)
    return found.as_dict()


def make(
    root: Path, names: Sequence[str], *, rounds: bool = False, unknown: Callable[[str], None] | None = None
) -> Comparison:
    """Compare. Raises CompareError or versions.VersionError.

    unknown: hears why the champion is not known where MLflow cannot be asked; without it, that is raised.
    """
    if names:
        runs = [versions.resolve(root, name) for name in names]
        with objects.opened(root) as stored:
            found = [g for run in dict.fromkeys(runs) for g in of_run(root, stored, run, every=rounds)]
    else:
        found = of_workspace(root)
    if not found:
        raise CompareError("there is no generation to compare")
    kept = champion(root) if unknown is None else _champion_if_known(root, unknown)
    rows = lines(found, kept)
    return Comparison(rows, kept.title if kept else None, verdict(rows))


def of_workspace(root: Path) -> list[Generation]:
    """Every generation of this checkout. Raises CompareError."""
    found = _json(root / COMPARISON)
    if found is None:
        raise CompareError("nothing is compared yet: `longview run`, or name runs (`longview data versions`)")
    lock = root / versions.LOCK
    made = YAML(typ="safe").load(lock.read_text(encoding="utf-8")) if lock.is_file() else {"stages": {}}
    paths = {name: root / EVALUATE / name / PREDICTIONS for name in found["order"]}
    run = Source(WORKSPACE, data.version(root), (_json(root / DECISION) or {}).get("candidate"))
    return _generations(run, found, found["order"], paths, made)


def of_run(root: Path, stored: Objects, run: RunVersion, *, every: bool) -> list[Generation]:
    """The generation that a run decided on, or all of them. Raises VersionError."""
    found = json.loads(versions.read(root, run, "metrics/comparison.json"))
    names = found["order"] if every else [run.candidate or found["order"][-1]]
    lock = versions.lock(root, run)
    made = {out["path"]: str(out.get("md5")) for s in lock["stages"].values() for out in s.get("outs", [])}
    paths = {name: _stored(stored, made.get(f"{EVALUATE}/{name}"), PREDICTIONS) for name in names}
    return _generations(Source(run.tag, run.data, run.candidate), found, names, paths, lock)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _stored(stored: Objects, md5: str | None, below: str) -> Path | None:
    """A file below a directory of DVC's, in the cache; fetched from the remote if it is not there."""
    for fetch in (False, True):
        if md5 is None:
            return None
        if fetch:
            stored.fetch(md5, below)
        part = stored.part(md5, below)
        if part and stored.path(part).is_file():
            return stored.path(part)
    return None


@dataclass(frozen=True)
class Source:
    """Where generations are from: a run's tag or the checkout, its data version, and its candidate."""

    run: str
    data: str | None
    candidate: str | None


def _generations(
    run: Source,
    found: Mapping[str, Any],
    names: Sequence[str],
    paths: Mapping[str, Path | None],
    lock: Mapping[str, Any],
) -> list[Generation]:
    order = found["order"]
    made = []
    for name in names:
        at = order.index(name)
        policy = order[at - 1] if at else None
        generation = Generation(
            run.run,
            name,
            _read(lock, name).get(data.FOLDER) or run.data,
            found["systems"][name],
            found["rounds"].get(name, {}),
            policy,
            rows=answers(paths[name]),
            checkpoints=checkpoints(lock, name),
            policy_md5=next(iter(checkpoints(lock, policy).values()), None) if policy else None,
            candidate=name == run.candidate,
        )
        made.append(generation)
    return made


def checkpoints(lock: Mapping[str, Any], name: str) -> dict[str, str]:
    """DVC's md5 of each checkpoint that a generation answered with, by path; none if it was not evaluated."""
    found = [(path, md5) for path, md5 in _read(lock, name).items() if path.startswith(CHECKPOINTS)]
    # The reasoning agent's first: the summary agent's is of every generation.
    return dict(sorted(found, key=lambda pair: "summary" in pair[0]))


def _read(lock: Mapping[str, Any], name: str) -> dict[str, str]:
    """What the stage that evaluated a generation read: path and md5."""
    out = f"{EVALUATE}/{name}"
    for stage in lock["stages"].values():
        if any(made["path"] == out for made in stage.get("outs", [])):
            return {dep["path"]: str(dep.get("md5")) for dep in stage.get("deps", [])}
    return {}


def champion(root: Path) -> Champion | None:
    """The champion with the answers kept of it; None without one."""
    from tasks import tracking

    with chdir(root):
        registry = registered.registry(root) if tracking.enabled() else None
        version = registry.champion() if registry else None
        if registry is None or version is None:
            return None
        agents = frozenset((version.agents.reasoning, version.agents.summary))
        return Champion(version.title, registry.predictions(version) or [], agents)


def _champion_if_known(root: Path, unknown: Callable[[str], None]) -> Champion | None:
    try:
        with registered.asking(root):
            return champion(root)
    except registered.RegistryUnknown as error:
        unknown(f"the champion is not known: {error}")
        return None


def main() -> None:
    """Compare this checkout's generations."""
    print(markdown(make(find_root(), [], unknown=lambda note: print(note, file=sys.stderr))))


if __name__ == "__main__":
    main()
