"""A folder in which the pipeline runs by itself: a clone of the checkout's commit, with its own seed.

    python -m benchmarks.workspace .work/try --seed 1 --profile tiny      # make one and run every stage in it

The clone shares the interpreter that runs this and nothing else: its data, DVC cache, lock and MLflow store
are its own. Making it again brings it to the checkout's present commit and keeps what is up to date.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.results import ROOT
from flows import pipeline, profile, recovery, terminal
from flows.environment import stage_environment

FOREIGN = ("LONGVIEW_", "PREFECT_", "MLFLOW_", "DVC_", "GIT_")  # settings of the checkout, not of the clone


class WorkspaceError(RuntimeError):
    """A workspace that cannot be used; the message says what to do."""


def make(
    folder: Path,
    seed: int,
    *,
    profile_name: str | None = None,
    rounds: int | None = None,
    source: Path = ROOT,
) -> Path:
    """A clone of `source` at its commit with `seed` in params.yaml and data/ in place; return it."""
    if (folder / ".git").is_dir():
        recovery.repair_rwlock(folder)
        recovery.restore_lock_file(folder)
        _update(folder, source)
    else:
        _clone(folder, source)
    profile.activate(folder, profile_name, rounds, force=profile_name is not None)
    set_seed(folder / "params.yaml", seed)
    _drop_other_rounds(folder)
    execute(folder, ["flows.data"])
    return folder


def _clone(folder: Path, source: Path) -> None:
    """A fresh clone. A committed dvc.lock is no record of what ran here, so it goes."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _git(folder.parent, "clone", "--quiet", str(source), str(part))
    (part / "dvc.lock").unlink(missing_ok=True)
    part.rename(folder)


def _update(folder: Path, source: Path) -> None:
    """Bring the clone to the commit of `source`; dvc.lock stays, so that only what changed runs again."""
    lock = folder / "dvc.lock"
    held = lock.read_bytes() if lock.is_file() else None
    _git(folder, "fetch", "--quiet", str(source), "HEAD")
    _git(folder, "checkout", "--quiet", "--force", "--detach", "FETCH_HEAD")
    lock.unlink(missing_ok=True)
    if held is not None:
        lock.write_bytes(held)


def _git(folder: Path, *arguments: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode != 0:
        raise WorkspaceError(f"git {arguments[0]} in {folder} failed: {done.stderr.strip()}")


def set_seed(path: Path, seed: int) -> None:
    """Change the one `seed:` of a parameter file and nothing else."""
    text, count = re.subn(r"^seed:.*$", f"seed: {seed}", path.read_text(encoding="utf-8"), flags=re.M)
    if count != 1:
        raise WorkspaceError(f"{path}: expected one top-level key 'seed', found {count}")
    path.write_text(text, encoding="utf-8")


def _drop_other_rounds(folder: Path) -> None:
    """Rounds of an earlier use that params.yaml no longer has would count as inputs of `compare`."""
    kept = set(profile.read_rounds(folder))
    for path in [*folder.glob("artifacts/rounds/r*"), *folder.glob("artifacts/evaluate/r*")]:
        if path.name[1:].isdigit() and path.name not in kept:
            shutil.rmtree(path)


def environment(folder: Path, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process of the workspace: nothing of the checkout's own settings leaks in."""
    kept = {
        name: value
        for name, value in stage_environment(folder).items()
        if not name.startswith(FOREIGN) and name not in ("PYTHONPATH", "PYTHONSAFEPATH")
    }
    return {**kept, "LONGVIEW_ROOT": str(folder), "DVC_NO_ANALYTICS": "1", **(settings or {})}


def execute(
    folder: Path, module: list[str], settings: Mapping[str, str] | None = None, *, code: Path | None = None
) -> None:
    """Run `python -m MODULE …` in the workspace, seen live and logged; nothing is left running if we die.

    It runs the workspace's own code, or that of the checkout `code`. settings: more of its environment.
    """
    log = folder / ".work" / "logs" / "benchmark.log"
    start = [sys.executable, "-m"] if code is None else [sys.executable, "-P", "-m"]
    paths = {} if code is None else {"PYTHONPATH": str(code)}
    variables = environment(folder, {**paths, **(settings or {})})
    status = terminal.run(terminal.supervised([*start, *module], folder, variables), log=log)
    if status != 0:
        raise WorkspaceError(
            f"`python -m {' '.join(module)}` in {folder} ended with status {status}; its last lines:\n"
            f"{terminal.tail(log)}\nCorrect the cause and run the benchmark again: what is done is kept."
        )


def waiting(folder: Path, until: str | None = None) -> list[str]:
    """Stages that are to run, in order: those that are not up to date and all that depend on them."""
    stages = pipeline.select(pipeline.stages(folder), until)
    stale = set(pipeline.pending(folder, [stage.name for stage in stages]))
    return [stage.name for stage in stages if stage.name in stale or stage.ancestors & stale]


def run_stage(folder: Path, name: str, settings: Mapping[str, str] | None = None) -> None:
    """`dvc repro` of one stage whose inputs are there."""
    execute(folder, ["dvc", "--wait-for-lock", "repro", "--single-item", name], settings)
    recovery.keep_lock_file(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second benchmark in the same folder; a killed one leaves nothing that must be removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceError(f"another benchmark is at work in {folder}: wait for it") from None
        yield


def main() -> None:
    """Make a workspace and run the whole pipeline in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    try:
        folder = make(args.folder.resolve(), args.seed, profile_name=args.profile, rounds=args.rounds)
        execute(folder, ["dvc", "repro"])
    except (WorkspaceError, pipeline.PipelineError, profile.ProfileError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
