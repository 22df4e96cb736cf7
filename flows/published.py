"""What a stage published and DVC did not record, because the run was killed in between: it is not made again.

A stage that the flow starts is told a digest of what it runs on, and leaves it with the md5 of its output
once this is complete, in MLflow, too (tasks/stage.py). The next run finds the note. If it would run the stage
on the same, it lets DVC record the output as it is.

    python -m flows.published        # the notes of this checkout
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows import pipeline
from tasks.stage import KEY, PUBLISHED


@contextmanager
def keyed() -> Iterator[None]:
    """Inside, DVC tells a stage's command the digest."""
    from dvc.stage import run

    cmd_run = run.cmd_run

    def telling(stage: Any, *args: Any, **options: Any) -> Any:
        os.environ[KEY] = pipeline.key(stage)
        return cmd_run(stage, *args, **options)

    run.cmd_run = telling
    try:
        yield
    finally:
        run.cmd_run = cmd_run


def record(root: Path, stage: str) -> bool:
    """Whether the stage's output was complete, and is recorded now."""
    note = _note(root, stage)
    if not note.is_file():
        return False
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        same = known["key"] == pipeline.inputs_key(root, stage)
        same = same and pipeline.record(root, stage, known["md5"])
    except (OSError, ValueError, LookupError):
        same = False
    note.unlink(missing_ok=True)
    return same


def forget(root: Path, stage: str) -> None:
    """DVC has recorded the stage's output."""
    _note(root, stage).unlink(missing_ok=True)


def _note(root: Path, stage: str) -> Path:
    return root / PUBLISHED / f"{stage}.json"


def main() -> None:
    """Print the stages with a note."""
    from flows.environment import root

    print("\n".join(sorted(path.stem for path in (root() / PUBLISHED).glob("*.json"))) or "none")


if __name__ == "__main__":
    main()
