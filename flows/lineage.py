"""Where an artifact came from: the stages that led to it, back to the data version.

    longview explain champion
    python -m flows.lineage artifacts/rounds/r2/dpo        # the stages' names

A chain is read from one dvc.lock, the workspace's or a run version's: what each stage read, obeyed and made,
by md5. Where a stage was executed is asked of the run versions and of MLflow, by the md5 of what it made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import chdir
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from flows import data, registered, versions
from flows.objects import Objects, directory_md5
from flows.versions import RunVersion

WORKSPACE = "workspace"
ROUNDS = "artifacts/rounds"
GENERATIONS = {"base": "artifacts/foundation/base", "multi_agent": "artifacts/reasoning_sft"}
ALIASES = ("champion", "challenger")


class LineageError(ValueError):
    """No such model or file, or nothing that says where it came from."""


@dataclass(frozen=True)
class Artifact:
    """A path at one version. `size` in bytes and the number of files, where dvc.lock has them."""

    path: str
    md5: str
    size: int | None = None
    files: int | None = None


@dataclass(frozen=True)
class Execution:
    """The MLflow run in which a stage was executed; `inputs` are the md5s that it recorded, by path."""

    run_id: str
    when: str
    git_commit: str | None
    parent: str | None
    inputs: dict[str, str]


@dataclass(frozen=True)
class Step:
    """A stage as it was executed. `code`: what it read that git keeps; `code_md5`: one digest of it."""

    stage: str
    command: str
    params: dict[str, Any]
    reads: tuple[Artifact, ...]
    makes: tuple[Artifact, ...]
    code: tuple[Artifact, ...]
    code_md5: str
    run: str | None = None
    commit: str | None = None
    mlflow: Execution | None = None


@dataclass(frozen=True)
class Chain:
    """What was asked for, and every step that led to it, a producer before its consumers."""

    asked: str
    source: str
    """Whose dvc.lock it was read from: `workspace`, or the tag of a run."""
    targets: tuple[Artifact, ...]
    data: Artifact | None
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    """What could not be found out, as sentences."""


@dataclass(frozen=True)
class Snapshot:
    """One dvc.lock with the data.dvc beside it."""

    name: str
    stages: dict[str, dict[str, Any]]
    data: Artifact | None

    @cached_property
    def outs(self) -> dict[str, tuple[str, Artifact]]:
        """Path of an out -> the stage that makes it, and what it made."""
        return {
            out["path"]: (name, artifact(out))
            for name, stage in self.stages.items()
            for out in stage.get("outs", [])
        }

    @cached_property
    def known(self) -> dict[str, Artifact]:
        """Everything DVC keeps: the outs of all stages, and the source data."""
        made = {path: out for path, (_, out) in self.outs.items()}
        return {**made, **({self.data.path: self.data} if self.data else {})}

    def named(self, md5: str) -> Artifact | None:
        """The out, or the part of one that a stage read, with this md5."""
        for _, out in self.outs.values():
            if out.md5 == md5:
                return out
        read = (dep for stage in self.stages.values() for dep in stage.get("deps", []))
        return next((artifact(dep) for dep in read if dep.get("md5") == md5), None)

    def producers(self, path: str) -> list[str]:
        """The stages that make this path, something above it, or something below it."""
        return list(dict.fromkeys(name for out, (name, _) in self.outs.items() if overlap(out, path)))

    def of_data(self, path: str) -> bool:
        """Whether a path is the source data or lies in it."""
        return self.data is not None and overlap(self.data.path, path)

    def made_md5(self, path: str, objects: Objects) -> str | None:
        """The md5 that `path` has by what its producers recorded. None: a listing is not in the cache."""
        if path in self.known:
            return self.known[path].md5
        files: dict[str, str] = {}
        for out, made in self.known.items():
            if path.startswith(f"{out}/"):
                return objects.part(made.md5, path.removeprefix(f"{out}/"))
            if out.startswith(f"{path}/"):
                listed = objects.listing(made.md5) if made.md5.endswith(".dir") else {"": made.md5}
                if listed is None:
                    return None
                inner = out.removeprefix(f"{path}/")
                files |= {f"{inner}/{name}".rstrip("/"): md5 for name, md5 in listed.items()}
        return directory_md5(files) if files else None


def artifact(entry: dict[str, Any]) -> Artifact:
    """An entry of dvc.lock or data.dvc."""
    return Artifact(entry["path"], str(entry.get("md5", "")), entry.get("size"), entry.get("nfiles"))


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other or lies in it."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def snapshot(root: Path, version: RunVersion | None = None) -> Snapshot:
    """The dvc.lock of a run version, or of the workspace. Raises LineageError if there is none."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    if version is not None:
        stages = versions.lock(root, version)["stages"]
        pointer = yaml.load(versions.read(root, version, versions.POINTER).decode())
        return Snapshot(version.tag, stages, artifact(pointer["outs"][0]))
    file = root / versions.LOCK
    if not file.is_file():
        raise LineageError("nothing was run here yet (no dvc.lock): `longview run`, or name a run with --at")
    pointer = yaml.load((root / data.POINTER).read_text()) if (root / data.POINTER).is_file() else None
    stages = (yaml.load(file.read_text(encoding="utf-8")) or {}).get("stages", {})
    return Snapshot(WORKSPACE, stages, artifact(pointer["outs"][0]) if pointer else None)


def explain(root: Path, name: str, objects: Objects, at: str | None = None) -> Chain:
    """The chain of a model or a file. Raises LineageError or versions.VersionError."""
    notes: list[str] = []
    try:
        mlflow = registered.client(root)
        models = registered.versions(root, mlflow)
    except registered.RegistryUnknown as error:
        mlflow, models = None, []
        notes.append(str(error))
    version = versions.resolve(root, at) if at else None
    found, targets = _targets(root, name, objects, version, models)
    history = _History(root, mlflow)
    steps = [history.dated(step) for step in steps_to(found, [target.path for target in targets])]
    unknown = [step.stage for step in steps if step.run is None and step.mlflow is None]
    if unknown:
        notes.append(f"no run version and no MLflow run says when these were executed: {', '.join(unknown)}")
    reads_data = any(found.of_data(a.path) for a in [*targets, *(r for step in steps for r in step.reads)])
    return Chain(
        name, found.name, tuple(targets), found.data if reads_data else None, tuple(steps), tuple(notes)
    )


def steps_to(found: Snapshot, paths: Iterable[str]) -> list[Step]:
    """Every stage that led to these paths, a producer before its consumers."""
    order: dict[str, Step] = {}

    def visit(stage: str) -> None:
        if stage in order:
            return
        made = _step(stage, found)
        for read in made.reads:
            for producer in found.producers(read.path):
                visit(producer)
        order[stage] = made

    for path in paths:
        for producer in found.producers(path):
            visit(producer)
    return list(order.values())


def _step(stage: str, found: Snapshot) -> Step:
    entry = found.stages[stage]
    deps = [artifact(dep) for dep in entry.get("deps", [])]
    reads = [dep for dep in deps if found.of_data(dep.path) or found.producers(dep.path)]
    code = [dep for dep in deps if dep not in reads]
    params = {key: value for file in entry.get("params", {}).values() for key, value in file.items()}
    return Step(
        stage=stage,
        command=str(entry.get("cmd", "")),
        params=params,
        reads=tuple(reads),
        makes=tuple(artifact(out) for out in entry.get("outs", [])),
        code=tuple(code),
        code_md5=directory_md5({dep.path: dep.md5 for dep in code}).removesuffix(".dir"),
    )


def _targets(
    root: Path, name: str, objects: Objects, version: RunVersion | None, models: list[registered.Registered]
) -> tuple[Snapshot, list[Artifact]]:
    model = _model(name, models)
    if model is not None:
        return _registered(root, model, version)
    found = snapshot(root, version)
    path = _generation(name) or Path(name).as_posix().rstrip("/")
    md5 = found.made_md5(path, objects)
    unlisted = [
        made for out, made in found.known.items() if overlap(out, path) and not objects.listing(made.md5)
    ]
    if md5 is None and not unlisted:
        known = ", ".join(sorted(found.known))
        raise LineageError(f"'{name}' is no model, and no file that {found.name} holds; it holds: {known}")
    whole = found.known.get(path)
    return found, [whole or Artifact(path, md5 or "")]


def _model(name: str, models: list[registered.Registered]) -> registered.Registered | None:
    """The registered version that is meant, or None if the name is none of the registry's."""
    model, at, alias = name.partition("@")
    alias = alias if at else name if name in ALIASES else ""
    number = name.removeprefix("v") if name.removeprefix("v").isdigit() else ""
    if not alias and not number:
        return None
    among = [m for m in models if m.model == model] if at else models
    for found in among:
        if alias in found.aliases or number == found.number:
            return found
    known = ", ".join(m.name for m in models) or "none"
    raise LineageError(f"no registered version '{name}'; there are: {known}")


def _registered(
    root: Path, model: registered.Registered, version: RunVersion | None
) -> tuple[Snapshot, list[Artifact]]:
    """The newest dvc.lock that knows a version's checkpoints, the workspace's first."""
    for candidate in [version] if version else [None, *versions.versions(root)]:
        try:
            found = snapshot(root, candidate)
        except LineageError:
            continue
        targets = [found.named(md5) for md5 in model.checkpoints.values()]
        if targets and None not in targets:
            return found, [target for target in targets if target]
    md5s = ", ".join(f"{role} {md5}" for role, md5 in model.checkpoints.items())
    where = version.tag if version else "the workspace and every run version"
    raise LineageError(f"{model.name}: {where} holds no checkpoint with its md5 ({md5s})")


def _generation(name: str) -> str | None:
    if re.fullmatch(r"r\d+", name):
        return f"{ROUNDS}/{name}/dpo"
    return GENERATIONS.get(name)


def local_name(root: Path, name: str) -> str:
    """A file named relative to the working directory, as a path of the checkout; other names as they are."""
    path = Path(name).absolute()
    inside = path.exists() and path.is_relative_to(root) and path != root
    return path.relative_to(root).as_posix() if inside else name


class _History:
    """When, from which commit and in which run a stage made what dvc.lock says."""

    def __init__(self, root: Path, mlflow: Any | None) -> None:
        self._root, self._mlflow = root, mlflow
        self._versions = list(reversed(versions.versions(root)))
        self._locks: dict[str, dict[str, Any]] = {}

    def dated(self, step: Step) -> Step:
        run, mlflow = self._run(step), self._execution(step)
        if run is None and mlflow is not None and mlflow.parent:
            run = next((v for v in self._versions if v.mlflow_run == mlflow.parent), None)
        commit = run.commit if run else mlflow.git_commit if mlflow else None
        return replace(step, run=run.tag if run else None, commit=commit, mlflow=mlflow)

    def _run(self, step: Step) -> RunVersion | None:
        """The oldest run that executed the stage with this result."""
        made = {out.path: out.md5 for out in step.makes}
        for version in self._versions:
            if step.stage in version.ran:
                entry = self._lock(version)["stages"].get(step.stage, {})
                if {out["path"]: out.get("md5") for out in entry.get("outs", [])} == made:
                    return version
        return None

    def _lock(self, version: RunVersion) -> dict[str, Any]:
        if version.tag not in self._locks:
            self._locks[version.tag] = versions.lock(self._root, version)
        return self._locks[version.tag]

    def _execution(self, step: Step) -> Execution | None:
        from tasks import tracking

        if self._mlflow is None or not step.makes:
            return None
        out = step.makes[0]
        with chdir(self._root):
            run = tracking.find_producer(out.path, out.md5, self._mlflow)
        if run is None:
            return None
        tags = run.data.tags
        sets = [given.dataset for given in run.inputs.dataset_inputs] if run.inputs else []
        return Execution(
            run_id=run.info.run_id,
            when=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
            git_commit=tags.get("mlflow.source.git.commit"),
            parent=tags.get("mlflow.parentRunId"),
            inputs={dataset.name: dataset.digest for dataset in sets},
        )


def main() -> None:
    """Print the stages that led to a file."""
    from flows.environment import root
    from flows.objects import opened

    with opened(root()) as objects:
        for step in explain(root(), sys.argv[1], objects).steps:
            print(step.stage, step.run or "", step.mlflow.run_id if step.mlflow else "")


if __name__ == "__main__":
    main()
