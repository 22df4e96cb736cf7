"""DVC's bytes by their md5: what a directory's listing holds, the md5 of a part of it, and hashing anew.

    with opened(root()) as objects:
        objects.listing("….dir")        # {"model.safetensors": "…", …}, or None if the cache has no listing

Nothing here trusts DVC's state database, which remembers md5s by a file's size and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.pipeline import PipelineError

ALGORITHM, DIRECTORY = "md5", ".dir"


class Objects:
    """The cache of a checkout, and its default remote."""

    def __init__(self, repo: Any) -> None:
        self.repo = repo
        self.cache = repo.cache.local
        self._trees: dict[str, Any] = {}

    def listing(self, md5: str) -> dict[str, str] | None:
        """The md5 of each file below a directory, by relative path. None: the cache has no such listing."""
        tree = self._tree(md5)
        return None if tree is None else {"/".join(key): info.value for key, _, info in tree}

    def part(self, md5: str, below: str) -> str | None:
        """The md5 that a file or folder below a directory has. None: no listing, or nothing of that name."""
        tree = self._tree(md5)
        found = tree.get_obj(self.cache, tuple(below.split("/"))) if tree is not None else None
        return None if found is None else str(found.hash_info.value)

    def path(self, md5: str) -> Path:
        """Where the cache keeps an object, whether it is there or not."""
        return Path(self.cache.oid_to_path(md5))

    def files(self, path: Path) -> list[Path]:
        """The files that DVC counts at a path of the workspace."""
        from dvc_objects.fs import localfs

        if path.is_file():
            return [path]
        return sorted(Path(file) for file in self.repo.dvcignore.find(localfs, str(path)))

    def in_remote(self, md5s: set[str]) -> set[str] | None:
        """Which of these the default remote has. None: no remote, or it does not answer."""
        try:
            remote = self.repo.cloud.get_remote_odb(None, "explain", hash_name=ALGORITHM)
            return set(remote.list_oids_exists(md5s))
        except Exception:  # whatever the storage's client raises: it could not be asked
            return None

    def fetch(self, md5: str, below: str | None = None) -> None:
        """Bring a file or directory, or one file below it, from the default remote, if it can be had."""
        from dvc.exceptions import DvcException
        from dvc_data.hashfile.hash_info import HashInfo

        with suppress(DvcException, OSError):
            self.repo.cloud.pull([HashInfo(ALGORITHM, md5)])
            self._trees.pop(md5, None)
            tree = self._tree(md5) if md5.endswith(DIRECTORY) else None
            files = [info for key, _, info in tree or () if below in (None, "/".join(key))]
            if files:  # DVC does not look into a directory that it is told to pull by its md5
                self.repo.cloud.pull(files)

    def _tree(self, md5: str) -> Any:
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectFormatError

        if md5 not in self._trees:
            try:
                self._trees[md5] = Tree.load(self.cache, HashInfo(ALGORITHM, md5))
            except (FileNotFoundError, ObjectFormatError):
                self._trees[md5] = None
        return self._trees[md5]


def directory_md5(files: dict[str, str]) -> str:
    """DVC's md5 of a directory with these files: relative path -> md5."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for path, md5 in files.items():
        tree.add(tuple(path.split("/")), None, HashInfo(ALGORITHM, md5))
    tree.digest()
    return str(tree.hash_info.value)


def rehash(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """The md5 of a file's bytes as they are now; `read` hears of every chunk, in bytes."""
    from dvc_data.hashfile.hash import file_md5
    from dvc_objects.fs import localfs
    from fsspec.callbacks import Callback

    class Reader(Callback):
        def relative_update(self, inc: int = 1) -> None:
            read(inc)

    return str(file_md5(str(path), localfs, callback=Reader(), name=ALGORITHM))


@contextmanager
def opened(root: Path) -> Iterator[Objects]:
    """The objects of a checkout. Raises PipelineError if it is no DVC project."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
        try:
            with chdir(root):
                yield Objects(repo)
        finally:
            repo.close()
    except DvcException as error:
        raise PipelineError(f"DVC: {error}") from error
