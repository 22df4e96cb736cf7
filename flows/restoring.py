"""Back to an earlier run: its data, derived sets and checkpoints, from cache or remote; nothing retrained.

    longview data rollback run/20261123-1a2b3c4d
    python -m flows.restoring latest

What comes back is what a run made and from what: dvc.lock, params.yaml and data.dvc, then every file that
they name. The user's branch and code stay. Killed on its way, the same command again finishes it.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import chdir
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import data, hashing, linking, pipeline, recovery, versions
from flows.environment import root as find_root
from flows.environment import work
from flows.hashing import Hashes
from flows.profile import drop_old_rounds
from flows.versions import LOCK, PARAMS, POINTER, RunVersion

RESTORED = (PARAMS, POINTER, LOCK)
MAP = "dvc.yaml"


def say(text: str) -> None:
    """One line for whoever watches."""
    print(text, flush=True)


class RollbackError(RuntimeError):
    """Nothing was restored, or not all of it; the message says why, and what to do."""


@dataclass(frozen=True)
class Restored:
    """What was done. `before`: the run version that the checkout was, to go back to; None if it was none."""

    tag: str
    data: str
    before: str | None
    code: tuple[str, ...]
    fetched: int
    kept: str | None = None
    """Where copies of what was overwritten by force lie."""


def restore(root: Path, name: str, *, with_code: bool = False, force: bool = False) -> Restored:
    """Make the checkout what the run made; ends with nothing stale, or raises.

    force: overwrite what is nowhere else, after a copy to .work/rollback/. Raises RollbackError,
    versions.VersionError, recovery.BusyError or pipeline.PipelineError.
    """
    with chdir(root), recovery.exclusive(root) as cleaned, hashing.once(outputs=True) as hashes:
        for sentence in cleaned:
            say(sentence)
        recovery.refuse_dvc(root)
        every = versions.versions(root)
        target = versions.resolve(root, name, every)
        before = next((v.tag for v in every if v.tag.endswith(f"-{versions.identity(root)}")), None)
        code = differing_code(root, target)
        if code and not with_code:
            place = target.tag.replace("/", "-")
            raise RollbackError(
                f"{target.tag} was made by other code: {_some(code)}\n"
                f"  to restore that code, too:    longview data rollback {name} --with-code\n"
                f"  to keep yours, elsewhere:     git worktree add ../{place} {target.tag}"
            )
        taken = [*RESTORED, *code]
        unsaved = unsaved_files(root, taken, every) + unsaved_outputs(root, hashes)
        if unsaved and not force:
            raise RollbackError(
                f"not saved anywhere else, and would be overwritten: {_some(unsaved)}\n"
                "  commit it (or `dvc commit` what stages made); --force goes on, and puts copies aside"
            )
        kept = put_aside(root, unsaved) if unsaved else None
        marker(root).parent.mkdir(parents=True, exist_ok=True)
        marker(root).write_text(f"{target.tag}\n")
        write(root, target, taken)
        with pipeline.opened(root):  # DVC reads what was written once, for all that follows
            fetched = check_out(root, hashes)
            for line in drop_old_rounds(root):
                say(line)
            hashes.clear()  # someone may have edited something meanwhile
            check(root, target)
        marker(root).unlink()
        return Restored(target.tag, target.data, before, tuple(code), fetched, kept)


def differing_code(root: Path, target: RunVersion) -> list[str]:
    """dvc.yaml, and files that stages read and git has, where they are not as they were in that run."""
    wanted = [MAP]
    for stage in versions.lock(root, target)["stages"].values():
        wanted += [d["path"] for d in stage.get("deps", []) if not _made(d["path"])]
    changed = versions.git(
        root, "diff", "--name-only", "--relative", target.commit, "--", *dict.fromkeys(wanted)
    )
    return changed.splitlines()


def _made(path: str) -> bool:
    return path == data.FOLDER or path.startswith((f"{data.FOLDER}/", "artifacts/"))


def unsaved_files(root: Path, names: list[str], every: list[RunVersion]) -> list[str]:
    """Of these files, those whose content neither HEAD nor any run version has."""
    commits = [version.commit for version in every]
    if versions.git(root, "rev-list", "--all", "--max-count=1"):
        commits.append("HEAD")
    return versions.unrecorded(root, names, commits)


def unsaved_outputs(root: Path, hashes: Hashes) -> list[str]:
    """data/ and outputs of stages that were edited by hand: DVC's cache has them as they were made only."""
    halfway = marker(root).exists()
    with pipeline.opened(root) as repo:
        outs = [out for stage in repo.index.stages for out in stage.outs if out.use_cache and out.hash_info]
        for out in outs if halfway else []:
            linking.remove_parts(Path(out.fs_path))
        return sorted(str(out.def_path) for out in outs if _unsaved(out, hashes.of(out), halfway))


def _unsaved(out: Any, content: Any, halfway: bool) -> bool:
    """Not what dvc.lock or data.dvc says, nor anything else that the cache has.

    halfway: a rollback was killed, so that files of two versions may stand side by side.
    """
    if content is None or content.hash_info == out.hash_info or out.cache.exists(content.hash_info.value):
        return False
    if halfway and content.hash_info.isdir:
        return not all(out.cache.exists(one.value) for _, _, one in content)
    return True


def put_aside(root: Path, names: list[str]) -> str:
    """Copies of what is about to be overwritten; returns the folder."""
    folder = work("rollback", f"{datetime.now(UTC):%Y%m%d-%H%M%S}", base=root)
    for name in names:
        source, copy = root / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy2(source, copy)
    return str(folder.relative_to(root))


def write(root: Path, target: RunVersion, names: list[str]) -> None:
    """The files as they were in that run, each at once; dvc.lock last, for it says what a stage has made."""
    for name in sorted(names, key=lambda name: name == LOCK):
        path = root / name
        try:
            content = versions.read(root, target, name)
        except versions.VersionError:  # not there then: only code can be
            path.unlink(missing_ok=True)
            continue
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        if path.is_file():
            shutil.copymode(path, part)
        part.replace(path)


def check_out(root: Path, hashes: Hashes) -> int:
    """Every file from the cache, and what the cache lacks from the remote; returns how many were fetched."""
    from dvc.exceptions import DvcException

    with pipeline.opened(root) as repo:
        outs = [out for out in repo.index.outs if out.use_cache and out.is_in_repo]
        used = [out.fspath for out in repo.index.outs if out.protocol == "local"]
        repo.state.remove_links(repo.state.get_unused_links(used, repo.fs), repo.fs)
        try:
            with linking.plainly():
                lacking = [out for out in outs if not link(out, hashes)]
        except (linking.CopyFailed, OSError) as error:
            raise RollbackError(
                f"{error}\n  `longview gc` frees disk; then the same again: it goes on where this one ended"
            ) from error
        if not lacking:
            return 0
        say("not all of it is in the cache: fetching from the remote")
        try:
            fetched = int(repo.fetch())
            repo.checkout(force=True)
            return fetched
        except DvcException as error:
            raise RollbackError(
                f"neither the cache nor the remote has all of it: {error}\n"
                "  `dvc remote list` says where was looked; with the right remote, do the same again"
            ) from error


def link(out: Any, hashes: Hashes) -> bool:
    """Make an output what dvc.lock says of it, by the files that differ alone. False: the cache lacks some.

    `dvc checkout` looks at each file of the workspace again to find these; here that is known already.
    """
    from dvc.exceptions import CheckoutError

    wanted, there = out.get_obj(), hashes.of(out)
    if wanted is not None and there is not None and there.hash_info == wanted.hash_info:
        return True
    hashes.forget(out)
    if wanted is None:
        return False
    if there is not None and there.hash_info.isdir != wanted.hash_info.isdir:
        out.remove()
        there = None
    try:
        out.checkout(force=True, old=there)
    except CheckoutError:
        return False
    if wanted.hash_info.isdir and there is not None:
        hashes.replaced(out, there, wanted)
    return True


def check(root: Path, target: RunVersion) -> None:
    """Raises RollbackError unless every stage and data/ are up to date."""
    found = {**pipeline.data_states(root), **pipeline.states(root)}
    stale = [
        f"{name} ({state.reason})" for name, state in found.items() if state.state != pipeline.UP_TO_DATE
    ]
    if stale:
        raise RollbackError(f"{target.tag} is restored, but not up to date: {_some(stale)}")


def marker(root: Path) -> Path:
    """There while files are overwritten, until all are checked: a rollback goes on, or was killed."""
    return work("rollback", "unfinished", base=root)


def summary(done: Restored) -> str:
    """What was done and what to do next, for a person."""
    lines = [f"back to {done.tag}: data {done.data[:8]}, its derived sets and checkpoints; nothing is stale"]
    lines += [f"{done.fetched} files came from the remote"] if done.fetched else []
    lines += [f"code restored, too: {_some(list(done.code))}"] if done.code else []
    lines += [f"copies of what was overwritten: {done.kept}"] if done.kept else []
    lines += [f"to undo this: longview data rollback {done.before}"] if done.before else []
    lines += ["MLflow's champion is unchanged: `longview model rollback` moves it"]
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


EXPECTED = (RollbackError, versions.VersionError, recovery.BusyError, pipeline.PipelineError)


def main() -> None:
    """Roll back from the command line."""
    try:
        print(summary(restore(find_root(), sys.argv[1])))
    except EXPECTED as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
