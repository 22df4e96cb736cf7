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


@contextmanager
def once() -> Iterator[None]:
    """Remember what the inputs of stages hash to, until a stage's command is run or the block ends."""
    from dvc import output
    from dvc.stage import run

    build, cmd_run = output.build, run.cmd_run
    known: dict[tuple[str, str], Any] = {}

    def remembered(odb: Any, path: str, fs: Any, name: str, **options: Any) -> Any:
        if fs.protocol != "local" or not options.get("dry_run"):  # an output: it is stored, too
            return build(odb, path, fs, name, **options)
        if (path, name) not in known:
            known[path, name] = build(odb, path, fs, name, **options)
        return known[path, name]

    def forgetting(*args: Any, **options: Any) -> Any:
        try:
            return cmd_run(*args, **options)
        finally:
            known.clear()

    output.build, run.cmd_run = remembered, forgetting
    try:
        yield
    finally:
        output.build, run.cmd_run = build, cmd_run
