"""The checkouts that share a cache or a remote, held together while something is deleted from it.

with held(root, [], alone=True) as projects:        # {checkout: its DVC project}, the other worktrees, too
    ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any

from flows import recovery, retention


class GcRefused(RuntimeError):
    """Nothing was deleted; the message says why, and what to do."""


@contextmanager
def held(root: Path, also: Iterable[Path], *, alone: bool) -> Iterator[dict[Path, Any]]:
    """The DVC projects of `root`, of the other worktrees of its repository and of `also`, all locked for DVC.

    `alone`: no run may be alive or begin in any of them either, and a dead one is cleaned up behind. Raises
    GcRefused or BusyError.
    """
    others = dict.fromkeys(path.resolve() for path in [*retention.worktrees(root), *also])
    others.pop(root.resolve(), None)
    with ExitStack() as stack:
        if alone:
            for other in others:
                stack.enter_context(_no_run(other))
            stack.enter_context(recovery.exclusive(root))  # last: its mark is that of this process
        projects = {other: stack.enter_context(project(other)) for other in others}
        yield {root: stack.enter_context(project(root)), **projects}


@contextmanager
def _no_run(other: Path) -> Iterator[None]:
    """Hold another checkout as a run of it would."""
    if not (other / ".dvc").is_dir():
        raise GcRefused(f"{other} is no checkout: there is no .dvc in it")
    with ExitStack() as stack:
        try:
            stack.enter_context(recovery.exclusive(other))
        except recovery.BusyError as error:
            raise recovery.BusyError(f"{other}: {error}") from None
        except OSError as error:
            raise GcRefused(f"{other} cannot be kept from running meanwhile: {error}") from error
        yield


@contextmanager
def project(root: Path) -> Iterator[Any]:
    """The DVC project with its lock held. Raises GcRefused if another DVC command has it."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        repo = Repo(str(root))
        try:
            with chdir(root), lock_repo(repo):
                yield repo
        finally:
            repo.close()
    except DvcException as error:
        raise GcRefused(f"DVC in {root}: {error}") from error
