"""The images and annotations of a data version: from data/ if it is in use, else from DVC's cache or remote.

longview compare run/20261101-1a2b3c4d latest --html page.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import data, data_versions, objects
from flows.objects import Objects
from tasks.flips import Source, boards_of, source_of
from tasks.pages import Pictures


@contextmanager
def source(root: Path, md5: str | None) -> Iterator[Source]:
    """What a page of questions of this data version is made from. Raises PipelineError."""
    if md5 is None or md5 == data.version(root):
        yield source_of(root / data.FOLDER)
        return
    with objects.opened(root) as stored:
        records = data_versions.records_of(stored, md5)
        yield Source(of_version(stored, md5), boards_of(records) if records else {})


def of_version(stored: Objects, md5: str) -> Pictures:
    """The images of one version of the data."""

    def read(name: str) -> bytes:
        for fetch in (False, True):
            if fetch:
                stored.fetch(md5, name)
            part = stored.part(md5, name)
            if part and stored.path(part).is_file():
                return stored.path(part).read_bytes()
        raise OSError(f"data version {md5[:8]} has no {name}, or it is neither in the cache nor the remote")

    return read
