"""DVC hashes each path once for a question, instead of once for each time that it needs the answer.

    with hashing.once():
        states = [stage.status() for stage in stages]

data/ is read by most stages, and for one stage that runs DVC hashes it seven times: thousands of files each
time, of which it looks up size, time and md5. Inside the block it does so once, and again after a command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Hashes:
    """What paths were found to hold: DVC's answers by path and algorithm."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Any] = {}

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


@contextmanager
def once(outputs: bool = False) -> Iterator[Hashes]:
    """Remember what the inputs of stages hash to, until a stage's command is run or the block ends.

    outputs: those of outputs, too. For questions alone: an output that is to be stored is read when it is.
    """
    from dvc import output
    from dvc.stage import run

    build, cmd_run = output.build, run.cmd_run
    hashes = Hashes()

    def remembered(odb: Any, path: str, fs: Any, name: str, **options: Any) -> Any:
        asked = outputs or options.get("dry_run")  # otherwise an output: it is stored, too
        if fs.protocol != "local" or not asked:
            return build(odb, path, fs, name, **options)
        if (path, name) not in hashes.found:
            hashes.found[path, name] = build(odb, path, fs, name, **{**options, "dry_run": True})
        return hashes.found[path, name]

    def forgetting(*args: Any, **options: Any) -> Any:
        try:
            return cmd_run(*args, **options)
        finally:
            hashes.found.clear()

    output.build, run.cmd_run = remembered, forgetting
    try:
        yield hashes
    finally:
        output.build, run.cmd_run = build, cmd_run
