"""The md5 DVC would give a file or a directory, without importing DVC: data versions in manifests and MLflow.

    python -m tasks.fingerprint data artifacts/judge

A file's md5 is that of its bytes. A directory's is the md5 of the JSON list of its files' md5 and relative
path, sorted by path, followed by ".dir" (36 characters). The checkout's `.dvcignore` is honoured.
Hashes are kept in .work/fingerprints.json by path, size, time and inode: an input is read once a version.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CACHE = Path(".work/fingerprints.json")
CHUNK_BYTES = 2**20
SETTLED_S = 1.0  # a younger file may change again within one tick of its clock: never cached
BUILT_IN_IGNORES = (".hg/", ".git/", ".git", ".dvc/")  # dvc.ignore.DvcIgnoreFilter


def file_md5(path: str | Path) -> str:
    """The md5 of a file's bytes, as 32 hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_of(root: str | Path) -> list[Path]:
    """The files DVC counts below a directory, sorted by relative path; symbolic links are followed."""
    root = Path(root)
    ignored = _ignore_rules()
    found = (Path(folder) / name for folder, _, names in _walk(root, ignored) for name in names)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def fingerprint(path: str | Path, *, cache: bool = True) -> str:
    """DVC's md5 of a file or directory; raises FileNotFoundError if there is none at `path`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: nothing here to fingerprint")
    files = files_of(path) if path.is_dir() else [path]
    stamp = _stamp(path, files)
    key = os.path.relpath(path)
    known = _read_cache() if cache else {}
    if known.get(key, {}).get("stamp") == stamp:
        return known[key]["md5"]
    value = _directory_md5(path, files) if path.is_dir() else file_md5(path)
    if cache and _settled(files):
        _write_cache(key, {"stamp": stamp, "md5": value})
    return value


def text_md5(text: str) -> str:
    """The md5 of a text, for keys made of other fingerprints."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _directory_md5(root: Path, files: Sequence[Path]) -> str:
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        pairs = list(zip(files, pool.map(file_md5, files), strict=True))
    entries = [{"md5": md5, "relpath": path.relative_to(root).as_posix()} for path, md5 in pairs]
    return text_md5(json.dumps(entries, sort_keys=True)) + ".dir"


def _walk(root: Path, ignored: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, names in os.walk(root, followlinks=True):
        base = Path(os.path.relpath(folder))
        folders[:] = [name for name in folders if not ignored(f"{(base / name).as_posix()}/")]
        yield folder, folders, [name for name in names if not ignored((base / name).as_posix())]


def _ignore_rules() -> Any:
    """A predicate over paths relative to the working directory (the root of the checkout)."""
    from pathspec import GitIgnoreSpec

    file = Path(".dvcignore")
    own = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return GitIgnoreSpec.from_lines([*BUILT_IN_IGNORES, *own]).match_file


def _stamp(root: Path, files: Sequence[Path]) -> str:
    """A hash of names, sizes, times and inodes: changes when a file is written, replaced or removed."""
    lines = []
    for path in files:
        info = path.stat()
        lines.append(f"{path.relative_to(root).as_posix()} {info.st_size} {info.st_mtime_ns} {info.st_ino}")
    return text_md5("\n".join(lines))


def _settled(files: Sequence[Path]) -> bool:
    newest = max((path.stat().st_mtime for path in files), default=0.0)
    return time.time() - newest > SETTLED_S


def _read_cache() -> dict[str, dict[str, str]]:
    try:
        return json.loads(CACHE.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_cache(key: str, entry: dict[str, str]) -> None:
    """Last writer wins: a lost entry costs one more hash, never a wrong one."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    temporary = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**_read_cache(), key: entry}, sort_keys=True), encoding="utf-8")
    temporary.replace(CACHE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one md5 and path a line, like md5sum."""
    for path in sys.argv[1:] if arguments is None else arguments:
        print(fingerprint(path), path)


if __name__ == "__main__":
    main()
