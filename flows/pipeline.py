"""DVC's view of the pipeline, in process: the stages in order, and which of them would run.

    python -m flows.pipeline        # one line a stage: up to date, stale or missing, and why

Asking in process costs a quarter of a second for the whole pipeline; a `dvc` command costs more each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import hashing

UP_TO_DATE, STALE, MISSING = "up to date", "stale", "missing"


class PipelineError(ValueError):
    """dvc.yaml or params.yaml cannot be read as a pipeline, or a stage that was named does not exist."""


@dataclass(frozen=True)
class StageInfo:
    """One stage of dvc.yaml, with everything below it."""

    name: str
    description: str
    outs: tuple[str, ...]
    ancestors: frozenset[str]

    @property
    def round(self) -> str | None:
        """`r2` for `dpo@r2`; None for stages outside the rounds."""
        suffix = self.name.partition("@")[2]
        return suffix if suffix[:1] == "r" and suffix[1:].isdigit() else None


@dataclass(frozen=True)
class StageState:
    """What DVC says of a stage: `up to date`, `stale` (an input changed), `missing` (not there)."""

    name: str
    state: str
    changes: tuple[tuple[str, str], ...] = ()
    """Each path that is not as it was, and what became of it."""

    @property
    def reason(self) -> str:
        """The changes as half a sentence."""
        return ", ".join(f"{path} {what}".strip() for path, what in self.changes)


def stages(root: Path) -> list[StageInfo]:
    """Every stage, each after all it depends on, in the order of dvc.yaml where that leaves a choice."""
    import networkx as nx

    with opened(root) as repo:
        graph = repo.index.graph  # an edge goes from a stage to the one it depends on
        found = [s for s in repo.index.stages if s.cmd]
        position = {s: i for i, s in enumerate(found)}
        forward = graph.subgraph(found).reverse()
        order = nx.lexicographical_topological_sort(forward, key=position.__getitem__)
        return [
            StageInfo(
                name=stage.addressing.partition(":")[2] or stage.addressing,
                description=stage.desc or "",
                outs=tuple(out.def_path for out in stage.outs),
                ancestors=frozenset(a.name for a in nx.ancestors(forward, stage)),
            )
            for stage in order
        ]


def select(everything: list[StageInfo], until: str | None) -> list[StageInfo]:
    """The stages needed for `until` (a stage, or a family: `dpo` for `dpo@r1`, …); None means all."""
    if until is None:
        return everything
    targets = [s for s in everything if s.name == until or s.name.startswith(f"{until}@")]
    if not targets:
        raise PipelineError(f"no stage '{until}'; there are: {', '.join(s.name for s in everything)}")
    wanted = {t.name for t in targets}.union(*(t.ancestors for t in targets))
    return [s for s in everything if s.name in wanted]


def states(root: Path, names: list[str] | None = None) -> dict[str, StageState]:
    """What DVC says of each stage now, by itself: an upstream stage that is stale does not show here."""
    with opened(root) as repo:
        found = {s.name: s for s in repo.index.stages if s.cmd}
        wanted = names or list(found)
        with hashing.once():
            return {name: _state(name, found[name].status()) for name in wanted}


def state(root: Path, name: str) -> StageState:
    """What DVC says of one stage now: it reads that one alone, not the whole pipeline."""
    with opened(root) as repo:
        return _state(name, repo.stage.load_one(name=name).status())


def data_states(root: Path) -> dict[str, StageState]:
    """What DVC says of the tracked source data (`*.dvc`)."""
    with opened(root) as repo:
        return {s.addressing: _state(s.addressing, s.status()) for s in repo.index.stages if not s.cmd}


def import_changed(root: Path, name: str) -> str | None:
    """What the source of a `dvc import-url` or `dvc import` holds now (an etag or md5), if that is not what
    `name` (a .dvc file) has; None if it is the same, or if nothing is imported."""
    with opened(root) as repo:
        found = [s for s in repo.index.stages if s.addressing == name and s.is_import]
        return next((str(s.deps[0].get_hash()) for s in found if s.deps[0].workspace_status()), None)


def pending(root: Path, names: list[str] | None = None) -> list[str]:
    """The stages that are not up to date."""
    return [s.name for s in states(root, names).values() if s.state != UP_TO_DATE]


def inputs_key(root: Path, name: str) -> str:
    """A digest of what a stage would run on now: its command, dependencies and parameters."""
    with opened(root) as repo:
        return key(repo.stage.load_one(name=name))


def key(stage: Any) -> str:
    """The same of DVC's stage."""
    from dvc.stage.serialize import to_single_stage_lockfile

    stage.save_deps(allow_missing=True)
    entry = {k: v for k, v in to_single_stage_lockfile(stage).items() if k != "outs"}
    return hashlib.md5(json.dumps(entry, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def record(root: Path, name: str, md5: str) -> bool:
    """Write to cache and dvc.lock what DVC would have, had it seen the stage end with an output of this md5.

    False, with nothing changed, if neither the workspace nor the cache has that output.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    with opened(root) as repo:
        stage = repo.stage.load_one(name=name)
        (out,) = stage.outs
        wanted = HashInfo("md5", md5)
        if not out.exists or out.get_hash() != wanted:
            out.hash_info = wanted
            if out.changed_cache():
                return False
            out.checkout(force=True)  # killed while DVC was linking it from the cache
        stage.save()
        stage.commit()
        stage.dump(update_pipeline=False)
    return True


def push(root: Path) -> int:
    """Copy what the workspace uses to the default remote; return how many files went. Idempotent."""
    with opened(root) as repo:
        return int(repo.push())


def _state(name: str, status: dict[str, list[Any]]) -> StageState:
    entries = next(iter(status.values()), [])
    changes: dict[str, str] = {}
    missing = False
    for entry in entries:
        if isinstance(entry, str):
            changes[entry] = ""
            continue
        for kind, items in entry.items():
            missing |= kind == "changed outs" and "deleted" in items.values()
            changes.update({path: _word(kind, what) for path, what in items.items()})
    if not changes:
        return StageState(name, UP_TO_DATE)
    return StageState(name, MISSING if missing else STALE, tuple(changes.items()))


def _word(kind: str, what: Any) -> str:
    if isinstance(what, dict):  # parameters: {"dpo.beta": "modified"}
        return "(" + ", ".join(what) + ")"
    return str(what)


@contextmanager
def opened(root: Path) -> Iterator[Any]:
    """The DVC project, locked for the length of a question; waits for another DVC command to end.

    Inside of another `opened` of the same root it is the same project, as it was read then.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    outer = _OPEN.get()
    if outer and outer[0] == root:
        yield outer[1]
        return
    try:
        repo = Repo(str(root), _wait_for_lock=True)
        try:
            with _inside(root), lock_repo(repo):
                before = _OPEN.set((root, repo))
                try:
                    yield repo
                finally:
                    _OPEN.reset(before)
        finally:
            repo.close()
    except DvcException as error:
        raise PipelineError(f"DVC: {error}") from error


_OPEN: ContextVar[tuple[Path, Any] | None] = ContextVar("_OPEN", default=None)


@contextmanager
def _inside(root: Path) -> Iterator[None]:
    """DVC names stages and outputs relative to the working directory."""
    from contextlib import chdir

    with chdir(root):
        yield


def main() -> None:
    """Print what DVC says of each stage."""
    from flows.environment import root

    now = states(root())
    for stage in stages(root()):
        print(f"{stage.name:24} {now[stage.name].state:12} {now[stage.name].reason}")


if __name__ == "__main__":
    main()
