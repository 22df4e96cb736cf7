"""What sampled chains come to, written as they come: paths.jsonl, failures.jsonl and counts of both.

with Outcomes(stage.out) as outcomes:
    sample_chains(..., take=outcomes.add)
outcomes.paths, outcomes.reasons
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from models.records import jsonl_writer

if TYPE_CHECKING:
    from tasks.sampling import Row


class Outcomes:
    """Both files appear in `folder` when the block has ended, or neither does.

    steps: paths by their number of steps; failures: failed chains by reason.
    """

    def __init__(self, folder: Path) -> None:
        self.steps: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self._folder, self._files = folder, ExitStack()

    @property
    def paths(self) -> int:
        """How many chains were finished."""
        return self.steps.total()

    @property
    def chains(self) -> int:
        """How many there are in all."""
        return self.paths + self.failures.total()

    @property
    def reasons(self) -> dict[str, int]:
        """Failed chains by reason, sorted."""
        return dict(sorted(self.failures.items()))

    def __enter__(self) -> Outcomes:
        self._write_path, self._write_failure = (
            self._files.enter_context(jsonl_writer(self._folder / name))
            for name in ("paths.jsonl", "failures.jsonl")
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, traceback)

    def add(self, row: Row) -> None:
        """Write a chain."""
        if "reason" in row:
            self.failures[row["reason"]] += 1
            self._write_failure(row)
        else:
            self.steps[len(row["steps"])] += 1
            self._write_path(row)
