"""The source data of a run: present, and exactly what data.dvc says; rebuilt or pulled where it is missing.

    python -m flows.data        # make data/ what data.dvc says, or stop with what to do

`data.dvc` carries `meta: {kind: boards}` (rebuilt with the same bytes on every machine) or `{kind: import}`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import pipeline
from flows.environment import root as find_root
from flows.environment import stage_environment

BUILDER = "tasks.boards"  # writes data/ of the embedded profile, deterministically
FOLDER, POINTER = "data", "data.dvc"
ASIDE = "data_watch"
"""Folder in .work for what data/ held when an update of it was killed."""


class DataError(RuntimeError):
    """data/ is missing or is not what data.dvc says; the message says what to do."""


def version(root: Path) -> str | None:
    """DVC's md5 of the source data, from data.dvc."""
    return (_pointer(root).get("outs") or [{}])[0].get("md5")


def kind(root: Path) -> str:
    """`boards` (can be rebuilt) or `import`."""
    pointer = _pointer(root)
    return str((pointer.get("meta") or {}).get("kind", "import" if pointer.get("deps") else "boards"))


def is_current(root: Path) -> bool:
    """Whether data/ is there and is what data.dvc says."""
    state = pipeline.data_states(root).get(POINTER)
    return state is not None and state.state == pipeline.UP_TO_DATE


def ensure(root: Path, say: Callable[[str], None] = print) -> str:
    """Make data/ what data.dvc says; return the md5. Raises DataError."""
    if not (root / POINTER).is_file():
        say(f"no {POINTER} yet: building the handwriting boards and tracking them")
        _build(root)
        return track(root, "boards")
    state = pipeline.data_states(root)[POINTER]
    if state.state == pipeline.STALE and (root / FOLDER).is_dir() and any((root / FOLDER).iterdir()):
        if _same_version(root):  # killed between building and committing, or the cache was deleted
            dvc(root, "commit", "--quiet", "--force", POINTER)
            return str(version(root))
        raise DataError(
            f"{FOLDER}/ is not what {POINTER} says ({state.reason}).\n"
            f"  to go back to the tracked version:  dvc checkout {POINTER} --force\n"
            f"  to make this the new version:       dvc add {FOLDER}, then commit {POINTER}"
        )
    if state.state != pipeline.UP_TO_DATE:
        _restore(root, say)
    return str(version(root))


def require(root: Path, wanted: str) -> None:
    """Refuse if data.dvc names another version than `wanted` (an md5 or its beginning). Raises DataError."""
    found = version(root)
    if not (found or "").startswith(wanted):
        raise DataError(
            f"this run is for data version {wanted}, but {POINTER} names {found}.\n"
            "  if that is newer, there is nothing to do: it has a run of its own, or the next one takes it\n"
            f"  to train on this one:  longview data rollback {wanted}, then run again"
        )


def track(root: Path, kind: str) -> str:
    """Put data/ under DVC as it is (`dvc add`), note where it came from, and return its md5."""
    dvc(root, "add", "--quiet", FOLDER)
    pointer = _pointer(root)
    pointer["meta"] = {"kind": kind}
    _write_pointer(root, pointer)
    return str(version(root))


def _restore(root: Path, say: Callable[[str], None]) -> None:
    for command in (("checkout", POINTER), ("pull", POINTER)):
        if dvc(root, *command, "--quiet", check=False) == 0 and _matches(root):
            say(f"{FOLDER}/ restored by `dvc {command[0]}`")
            return
    if kind(root) != "boards":
        raise DataError(
            f"{FOLDER}/ is missing, and neither the cache nor the remote has version {version(root)}.\n"
            "  configure the remote that has it (`dvc remote modify local url …`), or import it again:\n"
            "      longview data import DIR"
        )
    say("building the handwriting boards")
    _build(root)
    if not _matches(root):
        raise DataError(
            f"the rebuilt {FOLDER}/ is not version {version(root)} of {POINTER}: other versions of numpy,\n"
            "pillow or scikit-learn, or changed code. `make install` restores the pinned versions; if the\n"
            f"change is meant, `dvc add {FOLDER}` makes it the new version; then commit {POINTER}."
        )
    dvc(root, "commit", "--quiet", "--force", POINTER)  # into the cache, so that it can be pushed


def _matches(root: Path) -> bool:
    return is_current(root) or _same_version(root)


def _same_version(root: Path) -> bool:
    """The same bytes as data.dvc says, even if the cache does not have them yet."""
    from contextlib import chdir

    from tasks.fingerprint import fingerprint

    with chdir(root):
        return Path(FOLDER).is_dir() and fingerprint(FOLDER) == version(root)


def _build(root: Path) -> None:
    status = subprocess.run([sys.executable, "-m", BUILDER], cwd=root, env=stage_environment(root)).returncode
    if status != 0:
        raise DataError(f"`python -m {BUILDER}` ended with status {status}; its message is above")


def dvc(root: Path, *arguments: str, check: bool = True) -> int:
    """Run a `dvc` command; return its status. Raises DataError if it fails and `check` is set."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=stage_environment(root),
        capture_output=True,
        text=True,
    )
    if check and done.returncode != 0:
        raise DataError(f"`dvc {' '.join(arguments)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.returncode


def _pointer(root: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    path = root / POINTER
    return YAML(typ="safe").load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_pointer(root: Path, pointer: dict[str, Any]) -> None:
    from ruamel.yaml import YAML

    with (root / POINTER).open("w", encoding="utf-8") as file:
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(pointer, file)


if __name__ == "__main__":
    try:
        print(ensure(find_root()))
    except DataError as error:
        sys.exit(str(error))
