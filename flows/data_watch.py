"""The flow that notices a new data version, imports it where it must, and tells Prefect.

    python -m flows.data_watch [--drop DIR]     # one look
    longview deploy --drop DIR                  # a look every five minutes, on the Prefect server

Three things make a new version: another md5 in data.dvc, however it came there; a changed URL, if data/ was
made by `dvc import-url`; a folder in the drop folder that passes `longview data check`. The version is then
announced by the event `longview.data.changed`, and the deployment `retrain` is started with its md5.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.events import emit_event
from pydantic import Field

from flows import data, pipeline, recovery
from flows.environment import root as find_root
from flows.environment import work
from flows.walk import say
from tasks import data_import

CHANGED, REFUSAL = "longview.data.changed", "longview.data.refused"
RESOURCE = {"prefect.resource.id": "longview.data", "prefect.resource.name": "data"}
NOTE = "data_watch.json"
IMPORTED, REFUSED = ".imported", ".refused"
SETTLED_S = 10.0
"""How long a folder must not have changed before it is looked at."""


@dataclass
class Look:
    """What one look found, by names of folders in the drop folder. busy: a run goes on, nothing was taken."""

    version: str | None = None
    announced: bool = False
    updated: bool = False
    imported: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    busy: bool = False


@flow(name="data-watch", persist_result=False)
def data_watch(
    drop: str | None = None,
    settled_s: Annotated[float, Field(ge=0)] = SETTLED_S,
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = data_import.MAX_BAD_SHARE,
) -> dict[str, Any]:
    """Notice a new version of the data, import it where it must, and announce it.

    Args:
        drop: A folder; every folder in it that is complete and passes `longview data check` becomes the data.
        settled_s: Seconds for which a folder must not have changed, so that none is taken half copied.
        max_bad_share: Share of records that may be unusable.
    """
    root, look = find_root(), Look()
    note = read_note(root)
    with chdir(root):
        try:
            update(root, note, look)
            if drop:
                take(root, Path(drop), settled_s, max_bad_share, look)
        except recovery.BusyError:
            say("a run of this checkout goes on: data/ stays as it is until it has ended")
            look.busy = True
        look.version = data.version(root)
        for name, reason in look.refused.items():
            refuse(name, reason)
        announce(root, note, look)
    return asdict(look)


def announce(root: Path, note: dict[str, str], look: Look) -> None:
    """Emit the event if the version is new: not announced before, and not what was trained on last. What an
    update imported is announced once it has been checked."""
    if look.version is None or look.version == note.get("version") or "before" in note:
        return
    look.announced = trained_on(root) != {look.version}
    if look.announced:
        say(f"data version {look.version}: announced")
        payload = {"md5": look.version, "before": note.get("version"), "imported": look.imported}
        emit_event(CHANGED, resource=RESOURCE, payload=payload)
    write_note(root, note, version=look.version)  # after the event: rather announced twice than never


def refuse(name: str, reason: str) -> None:
    """Say that data was refused, to whoever reads the log and to whoever is to be notified."""
    say(f"{name}: refused: {reason}")
    emit_event(REFUSAL, resource=RESOURCE, payload={"name": name, "reason": reason})


def read_note(root: Path) -> dict[str, str]:
    """What the last look left: `version` announced, and `refused`, what a URL held that cannot be used. While
    an update goes on also `found`, what the URL holds, and `before`, data.dvc as it was."""
    try:
        return json.loads(work(NOTE, base=root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_note(root: Path, note: dict[str, str], **values: str | None) -> None:
    """Change the note, here and on disk; None removes a value."""
    for name, value in values.items():
        if value is None:
            note.pop(name, None)
        else:
            note[name] = value
    path = work(NOTE, base=root)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(note), encoding="utf-8")
    part.replace(path)


def trained_on(root: Path) -> set[str]:
    """The versions of data/ that the stages in dvc.lock have read."""
    from ruamel.yaml import YAML

    path = root / "dvc.lock"
    lock = YAML(typ="safe").load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stages = (lock or {}).get("stages", {}).values()
    return {dep["md5"] for stage in stages for dep in stage.get("deps", []) if dep["path"] == data.FOLDER}


def update(root: Path, note: dict[str, str], look: Look) -> None:
    """`dvc update` if data/ was imported from a URL that holds something else now. What cannot be used is
    refused once, and data/ is then as it was.

    `dvc update` removes data/ before it fetches, so an edited data/ is refused first. Raises DataError.
    """
    if "before" in note:
        with recovery.exclusive(root):
            resume(root, note, look)
    found = pipeline.import_changed(root, data.POINTER)
    if found is None or found == note.get("refused"):
        return
    with recovery.exclusive(root):
        data_import.keep_pointer(root, data.ensure(root, say))
        write_note(root, note, found=found, before=_pointer(root))
        try:
            data.dvc(root, "update", "--quiet", data.POINTER)
        finally:
            settle(root, note, look)


def resume(root: Path, note: dict[str, str], look: Look) -> None:
    """What a killed look had begun. Where DVC was not done with it, data/ may hold half of what it was to
    fetch, or what was edited since: it is set aside."""
    folder = root / data.FOLDER
    if _pointer(root) != note["before"]:
        data.ensure(root, say)
    elif folder.is_dir() and any(folder.iterdir()) and not data.is_current(root):
        place = set_aside(folder, work(data.ASIDE, base=root))
        say(f"an update of {data.FOLDER}/ was killed: what it held is in {place}, the version before is back")
    settle(root, note, look)


def settle(root: Path, note: dict[str, str], look: Look) -> None:
    """Check what `dvc update` imported. If that cannot be used, or it did not succeed, data/ is as before."""
    updated = _pointer(root) != note["before"]
    reason = problem(root / data.FOLDER) if updated else None
    if reason or not updated:
        (root / data.POINTER).write_text(note["before"], encoding="utf-8")
        data.dvc(root, "checkout", "--quiet", "--force", data.POINTER)
    if reason:
        look.refused[data.POINTER] = reason
    look.updated = updated and reason is None
    refused = note["found"] if reason else note.get("refused")
    write_note(root, note, refused=refused, found=None, before=None)


def _pointer(root: Path) -> str:
    return (root / data.POINTER).read_text(encoding="utf-8")


def take(root: Path, drop: Path, settled_s: float, max_bad_share: float, look: Look) -> None:
    """Import every complete folder of the drop folder, the oldest first; set aside what cannot be used."""
    if not drop.is_dir():
        raise data.DataError(f"the drop folder {drop} does not exist: make it, or deploy with another --drop")
    first = {folder: snapshot(folder) for folder in candidates(drop)}
    if first:
        time.sleep(settled_s)
    for folder, before in first.items():
        reason = problem(folder)
        if not before or snapshot(folder) != before:
            look.unfinished.append(folder.name)
            say(f"{folder.name}: empty or still changing, looked at again next time")
            continue
        if reason is None:
            try:
                with recovery.exclusive(root):
                    done = data_import.import_folder(folder, root, max_bad_share=max_bad_share)
            except data_import.SourceRefused as error:
                reason = str(error)
        if reason is None:
            set_aside(folder, drop / IMPORTED)
            look.imported.append(folder.name)
            say(f"{folder.name}: imported as version {done.version}")
        else:
            aside = set_aside(folder, drop / REFUSED)
            aside.with_name(f"{aside.name}.reason.txt").write_text(f"{reason}\n", encoding="utf-8")
            look.refused[folder.name] = reason


def candidates(drop: Path) -> list[Path]:
    """The folders of the drop folder, the oldest first. What begins with a dot is ours or a copier's."""
    folders = [path for path in drop.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(folders, key=lambda path: (path.stat().st_mtime, path.name))


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    """Path, size and change time of every file: equal while nothing is written. (`cp -p` sets mtime back.)"""
    return sorted(_files(folder))


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with suppress(FileNotFoundError):  # a copier's temporary name
                status = path.lstat()
                yield str(path), status.st_size, status.st_ctime_ns


def problem(folder: Path) -> str | None:
    """Why `longview data check` finds the folder unusable; None if it does not."""
    try:
        return "; ".join(data_import.check(folder).errors) or None
    except data_import.ImportRefused as error:
        return str(error)


def set_aside(folder: Path, shelf: Path) -> Path:
    """Move the folder into another, on the same file system; a name that is taken gets a number."""
    shelf.mkdir(exist_ok=True)
    place, number = shelf / folder.name, 2
    while place.exists():
        place, number = shelf / f"{folder.name}.{number}", number + 1
    return folder.rename(place)


def main() -> None:
    """One look from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drop", help="the drop folder")
    try:
        print(json.dumps(data_watch(parser.parse_args().drop), indent=1))
    except (data.DataError, data_import.ImportRefused) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
