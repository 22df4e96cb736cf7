"""Generations and runs side by side: accuracy, paired differences, rounds, data, and what flipped.

    longview compare                                    # this checkout's generations
    longview compare run/20261101-1a2b3c4d latest       # the best generation of each run
    python -m flows.compare

The figures of an earlier run are in its commit (metrics/), its answers in DVC's cache or the remote; nothing
of the working tree is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows import data, objects, versions
from flows.environment import root as find_root
from flows.objects import Objects
from flows.versions import RunVersion
from tasks.side_by_side import (
    HEAD,
    WORKSPACE,
    Comparison,
    Generation,
    answers,
    cells,
    lines,
    markdown,
    verdict,
)

EVALUATE, PREDICTIONS = "artifacts/evaluate", "predictions.jsonl"
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
    found = make(find_root(), runs or [], rounds=rounds)
    table = [dict(zip(HEAD, cells(row), strict=True)) for row in found.rows]
    create_table_artifact(table, key="generations", description=found.verdict)
    create_markdown_artifact(markdown(found), key="compare", description=found.verdict)
    return found.as_dict()


def make(root: Path, names: Sequence[str], *, rounds: bool = False) -> Comparison:
    """Compare. Raises CompareError or versions.VersionError."""
    with objects.opened(root) as stored:
        if names:
            runs = [versions.resolve(root, name) for name in names]
            found = [g for run in dict.fromkeys(runs) for g in of_run(root, stored, run, every=rounds)]
        else:
            found = of_workspace(root)
    if not found:
        raise CompareError("there is no generation to compare")
    title, kept = champion(root)
    rows = lines(found, kept)
    return Comparison(rows, title, verdict(rows))


def of_workspace(root: Path) -> list[Generation]:
    """Every generation of this checkout. Raises CompareError."""
    if not (root / COMPARISON).is_file():
        raise CompareError("nothing is compared yet: `longview run`, or name runs (`longview data versions`)")
    found = json.loads((root / COMPARISON).read_text(encoding="utf-8"))
    paths = {name: root / EVALUATE / name / PREDICTIONS for name in found["order"]}
    return _generations(WORKSPACE, data.version(root), found, found["order"], paths)


def of_run(root: Path, stored: Objects, run: RunVersion, *, every: bool) -> list[Generation]:
    """The generation that a run decided on, or all of them. Raises VersionError."""
    found = json.loads(versions.read(root, run, "metrics/comparison.json"))
    names = found["order"] if every else [run.candidate or found["order"][-1]]
    stages = versions.lock(root, run)["stages"].values()
    made = {out["path"]: str(out.get("md5")) for stage in stages for out in stage.get("outs", [])}
    paths = {name: _stored(stored, made.get(f"{EVALUATE}/{name}"), PREDICTIONS) for name in names}
    return _generations(run.tag, run.data, found, names, paths)


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


def _generations(
    run: str,
    version: str | None,
    found: Mapping[str, Any],
    names: Sequence[str],
    paths: Mapping[str, Path | None],
) -> list[Generation]:
    order = found["order"]
    made = []
    for name in names:
        at, path = order.index(name), paths[name]
        rows = answers(path)
        policy = order[at - 1] if at else None
        made.append(
            Generation(
                run, name, version, found["systems"][name], found["rounds"].get(name, {}), policy, rows
            )
        )
    return made


def champion(root: Path) -> tuple[str | None, Sequence[Mapping[str, Any]]]:
    """The champion's title and the answers kept with it; None and nothing without one."""
    from tasks import tracking
    from tasks.registry import Registry

    with chdir(root):
        uri = tracking.tracking_uri()
        if not tracking.enabled() or (uri.startswith("sqlite:///") and not Path(uri[10:]).exists()):
            return None, []
        registry = Registry()
        version = registry.champion()
        return (version.title, registry.predictions(version) or []) if version else (None, [])


def main() -> None:
    """Compare this checkout's generations."""
    print(markdown(make(find_root(), [])))


if __name__ == "__main__":
    main()
