"""Removing a folder that others read by what is in it.

drop(Path("steps"))
"""

from __future__ import annotations

import shutil
from pathlib import Path


def drop(folder: Path, gone: Path | None = None) -> None:
    """Remove a folder; killed on the way, it leaves nothing that could be taken for a whole one.

    gone: the name under which it is removed, beside it by default.
    """
    gone = gone or folder.with_name(folder.name + ".gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
