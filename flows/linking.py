"""DVC copies a file from its cache at once, where its file system has nothing better.

    with linking.plainly():
        output.checkout()

A file system that can share blocks (reflink) is found out once a folder; where it cannot, DVC tries it again
for each file that it copies: a file more made and deleted. Thousands of images then take twice as long.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, what `cache.type` leaves to be copied is copied; links are made as ever."""
    from dvc_data.hashfile import checkout
    from dvc_objects.fs.local import LocalFileSystem

    transfer = checkout.transfer

    def copied(from_fs: Any, source: str, to_fs: Any, target: str, links: list[str], callback: Any) -> None:
        local = isinstance(from_fs, LocalFileSystem) and isinstance(to_fs, LocalFileSystem)
        if links != ["copy"] or not local:
            transfer(from_fs, source, to_fs, target, links=links, callback=callback)
            return
        part = Path(f"{target}.part")
        shutil.copyfile(source, part)
        part.rename(target)  # whole, or not there
        callback.relative_update()

    vars(checkout)["transfer"] = copied
    try:
        yield
    finally:
        vars(checkout)["transfer"] = transfer
