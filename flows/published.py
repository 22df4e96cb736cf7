"""What a stage published and DVC did not record, because the run was killed in between: it is not made again.

A stage that the flow starts knows a digest of what it runs on, and leaves it with the md5 of its output once
that is complete, in MLflow, too (tasks/stage.py). The next run finds this note. If it would run the stage on
the same, it lets DVC record the output as it is.

    python -m flows.published        # the notes of this checkout
"""

from __future__ import annotations

import json
from pathlib import Path

from flows import pipeline
from tasks.stage import PUBLISHED


def record(root: Path, stage: str, key: str) -> bool:
    """Whether the stage's output was complete, and is recorded now."""
    note = _note(root, stage)
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        same = known["key"] == key and pipeline.record(root, stage, known["md5"])
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
