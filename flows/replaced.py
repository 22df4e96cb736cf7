"""The data versions that imports replaced, and may be gone back to: .work/data_import/MD5.pointer names each.

judge(root, 30.0, used)        # each with what keeps it
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import data

DAY_S = 86400.0


@dataclass(frozen=True)
class Replaced:
    """A data version that nothing needs but its pointer, data.dvc as it was; no reason: it goes."""

    pointer: Path
    reasons: tuple[str, ...]

    @property
    def md5(self) -> str:
        """DVC's md5 of the version."""
        return self.pointer.stem


def pointers(root: Path) -> list[Path]:
    """Those that imports into this checkout left."""
    from tasks.data_import import WORK

    return sorted((root / WORK).glob("*.pointer"))


def judge(root: Path, keep_days: float, used: set[str]) -> list[Replaced]:
    """The versions that are not among `used`, the md5s of what is kept anyway. Replaced lately, one stays."""
    old = time.time() - keep_days * DAY_S
    return [
        Replaced(pointer, ("replaced by an import, young enough",) if pointer.stat().st_mtime > old else ())
        for pointer in pointers(root)
        if pointer.stem not in used
    ]


def outs(repo: Any, pointers: list[Path]) -> Iterator[tuple[str, Any]]:
    """What DVC would restore if these pointers were data.dvc: DVC's outputs, each with who needs it."""
    from dvc.dvcfile import SingleStageFile
    from dvc.stage.loader import SingleStageLoader

    place = SingleStageFile(repo, str(Path(repo.root_dir) / data.POINTER))
    for pointer in pointers:
        stage, text = SingleStageFile(repo, str(pointer), verify=False)._load_yaml()
        for out in SingleStageLoader.load_stage(place, stage, text).outs:
            yield str(pointer), out
