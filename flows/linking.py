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

PART = ".longview-part"


class CopyFailed(RuntimeError):
    """A file could not be written; the message names it and says why."""


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
        _copy(source, target)
        callback.relative_update()

    vars(checkout)["transfer"] = copied
    try:
        yield
    finally:
        vars(checkout)["transfer"] = transfer


def _copy(source: str, target: str) -> None:
    """The file is there whole, or not at all."""
    part = Path(f"{target}{PART}")
    try:
        shutil.copyfile(source, part)
        part.rename(target)
    except FileNotFoundError:  # the cache lacks it
        raise
    except OSError as error:  # DVC would say that no kind of link is possible
        raise CopyFailed(f"{target}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """What a kill left half copied below a folder, or beside the file that it would have become."""
    for part in [*folder.rglob(f"*{PART}"), folder.with_name(folder.name + PART)]:
        part.unlink(missing_ok=True)
