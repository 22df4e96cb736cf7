"""What a large folder held when it was last hashed, by the numbers, sizes and times of its files.

    seen = numbers(folder)                  # {"images/1.png": (inode, mtime in ns, bytes), …}
    keep(folder, md5, seen)                 # and later, maybe in another process:
    known(folder, numbers(folder))          # the md5, if nothing has changed since

DVC keeps the same of every file in a database, and asks it for each: 0.1 s for 3,000 images, each time that
a stage reads them. Here one comparison does for all, as in git's index; where anything differs, DVC is asked.
"""

from __future__ import annotations

import hashlib
import marshal
import os
from contextlib import suppress
from pathlib import Path

from flows.environment import root, work

Numbers = dict[str, tuple[int, int, int]]
LARGE = 100
"""Files; fewer are soon looked up in DVC's database."""
RULES = ".dvcignore"


def numbers(folder: str) -> Numbers | None:
    """Inode, time of the last change in ns and size of every file below a folder, by relative path.

    The rules by which DVC ignores files are among them, by absolute path. None if there is a symbolic link
    or no such folder.
    """
    found: Numbers = {}
    waiting = [""]
    try:
        while waiting:
            below = waiting.pop()
            with os.scandir(f"{folder}/{below}") as entries:
                for entry in entries:
                    name = below + entry.name
                    if entry.is_symlink():
                        return None
                    if entry.is_dir():
                        waiting.append(f"{name}/")
                        continue
                    stat = entry.stat()
                    found[name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        top = root()
        for above in Path(folder).parents:
            if above.is_relative_to(top) and (rules := above / RULES).is_file():
                stat = rules.stat()
                found[str(rules)] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return None
    return found


def keep(folder: str, md5: str, seen: Numbers) -> None:
    """Note that the folder has this md5 while its files have these numbers."""
    file = _file(folder)
    with suppress(OSError):  # no note, then: the next one asks DVC
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(marshal.dumps((folder, md5, seen)))
        part.replace(file)


def known(folder: str, seen: Numbers) -> str | None:
    """The md5 that the folder has, if its files have the numbers that were noted."""
    try:
        noted = marshal.loads(_file(folder).read_bytes())
    except (OSError, ValueError, EOFError, TypeError):
        return None
    return noted[1] if isinstance(noted, tuple) and noted[::2] == (folder, seen) else None


def _file(folder: str) -> Path:
    name = hashlib.md5(folder.encode(), usedforsecurity=False).hexdigest()
    return work("seen", name)
