"""Free disk without losing what a kept run, a registered model, a branch, the workspace or a live run needs.

    longview gc                     # what would go
    longview gc --yes               # it goes

What is used is asked of DVC, revision by revision (`dvc gc` takes one revision, not a list of them), and what
is not used is removed by DVC's own collector. Tags go first: killed at any moment, no tag is left without its
files, and the next call goes on.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from flows import data, recovery, registered, replaced, retention
from flows.checkouts import GcRefused
from flows.environment import work
from flows.registered import Registered
from flows.replaced import DAY_S, Replaced
from flows.retention import Policy, Verdict

SCRATCH = re.compile(r"[0-9a-f]{16}")  # tasks/stage.py: .work/<stage>/<fingerprint of its inputs>


@dataclass(frozen=True)
class Unused:
    """Objects of one store that nothing kept needs. `size` in bytes."""

    store: str
    md5s: frozenset[str]
    size: int
    total: int
    """Objects in the store altogether."""


@dataclass(frozen=True)
class Plan:
    """What would go, what stays and why, and what could not be known."""

    verdicts: tuple[Verdict, ...]
    used: frozenset[Any]
    """DVC's hash infos of everything that is kept."""
    unused: tuple[Unused, ...]
    scratch: tuple[tuple[Path, int], ...]
    replaced: tuple[Replaced, ...]
    failed_runs: tuple[str, ...]
    registered: tuple[Registered, ...]
    warnings: tuple[str, ...]
    obstacles: tuple[str, ...] = field(default=())
    """Why `carry_out` would refuse."""

    @property
    def dropped(self) -> list[Any]:
        """The runs that nothing keeps."""
        return [verdict.version for verdict in self.verdicts if not verdict.reasons]

    @property
    def size(self) -> int:
        """Bytes that would be freed."""
        return sum(store.size for store in self.unused) + sum(size for _, size in self.scratch)


def plan(
    root: Path,
    projects: dict[Path, Any],
    policy: Policy,
    *,
    remote: str | None = None,
    shared: bool = False,
    failed_runs: bool = False,
) -> Plan:
    """What would go. Changes nothing. `projects`: what `checkouts.held` gives.

    Raises GcRefused or versions.VersionError.
    """
    try:
        mlflow = registered.client(root)
        models = [model for model in registered.versions(root, mlflow) if model.held]
    except registered.RegistryUnknown as error:
        raise GcRefused(f"{error}. Which models are registered is not known, so nothing goes.") from None
    verdicts = retention.judge(root, policy, models)
    dropped = [verdict.version for verdict in verdicts if not verdict.reasons]
    repo, siblings = projects[root], {path.resolve() for path in retention.worktrees(root)}
    used, lost = _used(_outs(repo, retention.revisions(root, dropped)))
    for other, theirs in projects.items():
        if other == root:
            continue
        with chdir(other):
            revisions = {} if other in siblings else retention.revisions(other, [])
            outs = chain(_outs(theirs, revisions), replaced.outs(theirs, replaced.pointers(other)))
            more, missing = _used(outs)
        used, lost = used | more, [*lost, *missing]
    unfound = _keep_registered(repo.cache.local, models, verdicts, used)
    before = replaced.judge(root, policy.keep_days, {info.value for info in used})
    more, missing = _used(replaced.outs(repo, [version.pointer for version in before if version.reasons]))
    used, lost = used | more, [*lost, *missing]
    stores = [("cache", repo.cache.local), *([(f"remote {remote}", _remote(repo, remote))] if remote else [])]
    outside = not Path(repo.cache.local.path).resolve().is_relative_to(root)
    obstacles = [f"{line}: `dvc pull` where it may be, or give up what names it" for line in lost]
    if remote and unfound:
        obstacles.append(
            f"{', '.join(unfound)}: no run version and nothing in the cache holds the checkpoint, so what it "
            "needs of the remote is not known; leave out --remote"
        )
    if outside and not shared:
        obstacles.append(
            "the cache lies outside this checkout: name every other checkout that uses it (--also DIR), "
            "and add --shared"
        )
    return Plan(
        verdicts=tuple(verdicts),
        used=frozenset(used),
        unused=tuple(_unused(name, odb, used) for name, odb in stores),
        scratch=tuple(_scratch(root, repo, policy.keep_days)),
        replaced=tuple(before),
        failed_runs=_failed(mlflow, policy.keep_days, verdicts) if failed_runs and mlflow else (),
        registered=tuple(models),
        warnings=tuple(_warnings(remote, outside)),
        obstacles=tuple(obstacles),
    )


def carry_out(root: Path, projects: dict[Path, Any], made: Plan, *, remote: str | None = None) -> None:
    """Delete what the plan says. `projects`: of `checkouts.held`, alone, since before the plan was made.

    Tags and pointers, then directories' listings, then files, then scratch. Raises GcRefused before anything
    is deleted.
    """
    for checkout in projects:
        recovery.refuse_dvc(checkout)
    if made.obstacles:
        raise GcRefused("\n".join(made.obstacles))
    repo = projects[root]
    for version in made.dropped:
        _note(root, f"git update-ref refs/tags/{version.tag} {version.commit}")
        retention.forget(root, version)
    for version in made.replaced:
        if not version.reasons:
            version.pointer.unlink(missing_ok=True)
    _collect(repo.cache.local, made.used)
    if remote:
        from dvc_data.hashfile.db import get_index

        odb = _remote(repo, remote)
        get_index(odb).clear()  # what DVC remembers of the remote: rather nothing than what a kill made wrong
        _collect(odb, made.used)
    for path, _ in made.scratch:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    if made.failed_runs:
        _delete_runs(root, made.failed_runs)


def _outs(repo: Any, names: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """DVC's outputs of the workspace and of these commits, each with who needs it."""
    for revision in repo.brancher(revs=list(names), sha_only=True):
        for out in repo.index.outs:
            yield names.get(revision, "the workspace"), out


def _used(outs: Iterable[tuple[str, Any]]) -> tuple[set[Any], list[str]]:
    """DVC's hash infos of what is needed, and the directories whose listings are nowhere."""
    from dvc.exceptions import DvcException

    used: set[Any] = set()
    lost: list[str] = []
    known: set[str] = set()
    try:
        for where, out in outs:
            md5 = out.hash_info.value if out.use_cache and out.hash_info else None
            if not md5 or md5 in known or out.stage.is_repo_import:
                continue
            known.add(md5)
            if out.is_dir_checksum and out.get_dir_cache() is None:
                lost.append(f"{where} needs {out}, and the list of its files ({md5}) is not to be found")
                continue
            used.update(*out.get_used_objs().values())
    except DvcException as error:
        raise GcRefused(f"what a revision needs cannot be read, so nothing goes: {error}") from error
    return used, lost


def _keep_registered(
    odb: Any, models: list[Registered], verdicts: list[Verdict], used: set[Any]
) -> list[str]:
    """Add to `used` the checkpoints that no run holds; return the models whose files are not in the cache."""
    reasons = {reason for verdict in verdicts for reason in verdict.reasons}
    unfound = []
    for model in models:
        if f"trained {model.name}" in reasons:
            continue
        for md5 in model.checkpoints.values():
            tree = _containing(odb, md5)
            if tree is None:
                unfound.append(model.name)
            else:
                used.update([tree.hash_info, *(info for _, _, info in tree)])
    return list(dict.fromkeys(unfound))


def _containing(odb: Any, md5: str) -> Any | None:
    """The listing in the cache that is this directory, or has it as a part."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    for oid in odb.all():
        if not oid.endswith(".dir"):
            continue
        try:
            tree = Tree.load(odb, HashInfo(odb.hash_name, oid))
        except (ObjectFormatError, FileNotFoundError):
            continue
        folders = {key[:depth] for key, _, _ in tree for depth in range(1, len(key))}
        parts = (tree.get_obj(odb, folder) for folder in folders)
        if oid == md5 or any(part and part.hash_info.value == md5 for part in parts):
            return tree
    return None


def _unused(name: str, odb: Any, used: set[Any]) -> Unused:
    keep = {info.value for info in used if info.name == odb.hash_name}
    every = set(odb.all())
    loose = frozenset(every - keep)
    return Unused(
        name, loose, sum(int(odb.fs.info(odb.oid_to_path(oid))["size"] or 0) for oid in loose), len(every)
    )


def _collect(odb: Any, used: frozenset[Any]) -> None:
    from dvc_data.hashfile.gc import gc

    gc(odb, used)


def _scratch(root: Path, repo: Any, keep_days: float) -> Iterator[tuple[Path, int]]:
    """Journals and trainer checkpoints that no stage will take up again, old logs, what data/ was long ago.

    A stage that is not up to date may continue from its folder, so such folders stay while they are young.
    """
    old = time.time() - keep_days * DAY_S
    done = {stage.name for stage in repo.index.stages if stage.cmd and not stage.status()}
    for folder in sorted(work(base=root).glob("*/*")):
        if folder.is_dir() and (SCRATCH.fullmatch(folder.name) or folder.parent.name == data.ASIDE):
            files = [file for file in folder.rglob("*") if file.is_file()]
            newest = max((file.stat().st_mtime for file in files), default=folder.stat().st_mtime)
            if folder.parent.name in done or newest < old:
                yield folder, sum(file.stat().st_size for file in files)
        elif folder.parent.name == "logs" and folder.suffix == ".log" and folder.stat().st_mtime < old:
            yield folder, folder.stat().st_size


def _failed(mlflow: Any, keep_days: float, verdicts: list[Verdict]) -> tuple[str, ...]:
    """Runs of single stages that failed or were killed long ago; what a kept run names stays."""
    from tasks import tracking

    before = int((time.time() - keep_days * DAY_S) * 1000)
    named = {verdict.version.mlflow_run for verdict in verdicts if verdict.reasons}
    found = []
    for status in ("FAILED", "KILLED"):
        where = f"attributes.status = '{status}' and attributes.start_time < {before}"
        token = None
        while True:
            page = mlflow.search_runs([tracking.experiment_id(mlflow)], where, page_token=token)
            found += [
                r.info.run_id for r in page if "longview.stage" in r.data.tags and r.info.run_id not in named
            ]
            token = page.token
            if not token:
                break
    return tuple(found)


def _delete_runs(root: Path, run_ids: tuple[str, ...]) -> None:
    """Mark them deleted: `mlflow gc` then frees their files, on the machine that has the store."""
    mlflow = registered.client(root)
    if mlflow:
        for run_id in run_ids:
            mlflow.delete_run(run_id)


def _warnings(remote: str | None, outside: bool) -> Iterator[str]:
    if outside:
        yield "the cache lies outside this checkout; who needs it that --also does not name is not known"
    else:
        yield "other clones that are set to use this cache are not known: name them (--also)"
    if remote:
        yield (
            f"remote {remote}: what other clones need is known only as far as their branches and tags are in "
            "this repository (`git fetch --all --tags`) or --also names them"
        )


def _note(root: Path, line: str) -> None:
    """Before a tag goes, how to put it back."""
    path = work("gc.log", base=root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _remote(repo: Any, name: str) -> Any:
    return repo.cloud.get_remote_odb(name, "gc", hash_name="md5")
