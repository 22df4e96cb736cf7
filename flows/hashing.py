"""DVC hashes each path once for a question, instead of once for each time that it needs the answer.

    with hashing.once():
        states = [stage.status() for stage in stages]

data/ is read by most stages, and for one stage that runs DVC hashes it seven times: thousands of files each
time, of which it looks up size, time and md5. Inside the block it does so once, and again after a command;
a large folder of which nothing has changed since an earlier block is not even asked about (flows/seen.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flows import seen

ALGORITHM = "md5"


class Hashes:
    """What paths were found to hold: DVC's answers by path and algorithm."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Any] = {}
        self._seen: dict[str, seen.Numbers] = {}

    def clear(self) -> None:
        """Look at everything anew."""
        self.found.clear()
        self._seen.clear()

    def look(self, build: Callable[..., Any], odb: Any, path: str, fs: Any, name: str, **options: Any) -> Any:
        """What DVC's `build` answers for a path of the workspace, storing nothing."""
        numbers = seen.numbers(path) if name == ALGORITHM else None
        if numbers is None or len(numbers) < seen.LARGE:
            return build(odb, path, fs, name, **{**options, "dry_run": True})
        self._seen[path] = numbers
        md5 = seen.known(path, numbers)
        tree = _listed(odb, md5) if md5 else None
        if tree and (answer := _answer(odb, tree, numbers)):
            return answer
        answer = build(odb, path, fs, name, **{**options, "dry_run": True})
        seen.keep(path, answer[2].hash_info.value, numbers)
        return answer

    def of(self, out: Any) -> Any:
        """DVC's object of an output in the workspace: a HashFile or a Tree; None if it is not there."""
        if not out.exists:
            return None
        _, _, content = out._build(
            out.cache, out.fs_path, out.fs, out.hash_name, ignore=out.dvcignore, dry_run=True
        )
        return content

    def forget(self, out: Any) -> None:
        """The output, or something in it, is about to change."""
        inside = f"{out.fs_path}/"
        changed = [key for key in self.found if key[0] == out.fs_path or key[0].startswith(inside)]
        for key in changed:
            del self.found[key]

    def replaced(self, out: Any, before: Any, after: Any) -> None:
        """The output was `before` and is made `after`, by the files that differ alone.

        If no other file has changed meanwhile, DVC need not look at thousands of them again.
        """
        was, now = self._seen.pop(out.fs_path, None), seen.numbers(out.fs_path)
        answer = _answer(out.cache, after, now) if was and now else None
        if not (was and now and answer):
            return
        old = {key: md5 for key, _, md5 in before}
        kept = ["/".join(key) for key, _, md5 in after if old.get(key) == md5]
        if all(was[name] == now[name] for name in kept):
            seen.keep(out.fs_path, after.hash_info.value, now)
            self.found[out.fs_path, ALGORITHM] = answer


def _listed(odb: Any, md5: str) -> Any:
    """DVC's listing of a folder, from the cache; None if that lacks it."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    with suppress(FileNotFoundError, ObjectFormatError):
        return Tree.load(odb, HashInfo(ALGORITHM, md5))
    return None


def _answer(odb: Any, tree: Any, numbers: seen.Numbers) -> Any:
    """What DVC would answer for a folder of this listing; None if its files are others."""
    from dvc_data.hashfile.meta import Meta

    names = {"/".join(key) for key, _, _ in tree}
    if names != {name for name in numbers if not name.startswith("/")}:
        return None
    return odb, Meta(size=sum(numbers[name][2] for name in names), nfiles=len(names), isdir=True), tree


_active: Hashes | None = None


@contextmanager
def once(outputs: bool = False) -> Iterator[Hashes]:
    """Remember what the inputs of stages hash to, until a stage's command is run or the block ends.

    outputs: those of outputs, too. For questions alone: an output that is to be stored is read when it is.
    Inside of another such block it is the same one.
    """
    global _active
    if _active is not None:
        yield _active
        return
    hashes = _active = Hashes()
    try:
        with _remembering(hashes, outputs):
            yield hashes
    finally:
        _active = None


@contextmanager
def _remembering(hashes: Hashes, outputs: bool) -> Iterator[None]:
    """DVC asks `hashes` first."""
    from dvc import output
    from dvc.stage import run

    build, cmd_run = output.build, run.cmd_run

    def remembered(odb: Any, path: str, fs: Any, name: str, **options: Any) -> Any:
        asked = outputs or options.get("dry_run")  # otherwise an output: it is stored, too
        if fs.protocol != "local" or not asked:
            return build(odb, path, fs, name, **options)
        if (path, name) not in hashes.found:
            hashes.found[path, name] = hashes.look(build, odb, path, fs, name, **options)
        return hashes.found[path, name]

    def forgetting(*args: Any, **options: Any) -> Any:
        try:
            return cmd_run(*args, **options)
        finally:
            hashes.clear()

    output.build, run.cmd_run = remembered, forgetting
    try:
        yield
    finally:
        output.build, run.cmd_run = build, cmd_run
