"""Where DVC has the files of a stage output: in its cache, in the remote, or nowhere.

python -c "from pathlib import Path; from flows.checkpoints import where; print(where(Path('.'), 'MD5.dir'))"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def where(root: Path, md5: str) -> str | None:
    """`cache` or `remote` if every file of this output is there; None if neither has them all."""
    from dvc.config import ConfigError
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        if _holds(repo.cache.local, md5, whole=False):
            return "cache"
        try:
            remote = repo.cloud.get_remote_odb()
        except ConfigError:  # there is none
            return None
        return "remote" if _holds(remote, md5, whole=True) else None


def _holds(store: Any, md5: str, *, whole: bool) -> bool:
    """DVC writes the list of a folder to a remote after its files: there the list says that all came."""
    if not store.exists(md5):
        return False
    if whole or not md5.endswith(".dir"):
        return True
    listed = json.loads(Path(store.oid_to_path(md5)).read_text(encoding="utf-8"))
    return all(store.exists(entry["md5"]) for entry in listed)
