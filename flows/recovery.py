"""After a kill: one run at a time, no process left over from the last one, and DVC's files in order.

    python -m flows.recovery        # clean up by hand what a killed run left behind

What can be left over, and what is done about it:
- another run is alive in this checkout: refuse, naming its pid (a kernel lock, gone with its process);
- stages or a temporary Prefect server of a dead run: ended, found by the run's mark in their environment;
- entries of dead processes in DVC's rwlock, or a file cut in half: removed;
- a dvc.lock cut in half by another `dvc` (ours is written whole): replaced by the copy of the last run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.environment import process_started, work

OWNER = "LONGVIEW_FLOW_OWNER"  # "pid:started" of the flow, inherited by everything it starts


class BusyError(RuntimeError):
    """Another run of this checkout is alive."""


@contextlib.contextmanager
def exclusive(root: Path, *, wait: bool = False) -> Iterator[list[str]]:
    """Hold the checkout for one run and clean up behind a dead one; yields what was done, as sentences.

    Raises BusyError while another run holds it, unless it is to `wait` for its end.
    """
    path = work("run.lock", base=root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise BusyError(
                f"another run of this checkout is alive (pid {file.read().strip() or 'unknown'}): "
                "wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        with marked(root):
            yield clean(root)


@contextlib.contextmanager
def marked(root: Path) -> Iterator[None]:
    """Whatever is started inside carries this process's mark. Prefect starts its temporary server before the
    body of a flow runs: who calls the flow marks first."""
    before = {name: os.environ.get(name) for name in (OWNER, "LONGVIEW_ROOT")}
    os.environ.update({OWNER: f"{os.getpid()}:{process_started(os.getpid())}", "LONGVIEW_ROOT": str(root)})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def clean(root: Path) -> list[str]:
    """Everything above, once."""
    done = end_orphans(root)
    done += repair_rwlock(root)
    done += restore_lock_file(root)
    return done


def end_orphans(root: Path, stage: str | None = None) -> list[str]:
    """End what a dead run started; with `stage`, also what that stage of any run left behind."""
    import psutil

    orphans = []
    for process in psutil.process_iter(["pid", "name"]):
        with contextlib.suppress(psutil.Error, OSError):
            marks = process.environ()
            owner = marks.get(OWNER)
            if not owner or marks.get("LONGVIEW_ROOT") != str(root):
                continue
            if not _alive(owner) or (stage and marks.get("DVC_STAGE") == stage):
                orphans.append(process)
    for process in orphans:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(orphans, timeout=10)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [f"ended process {p.pid} ({p.info['name']}), left over from a killed run" for p in orphans]


def _alive(owner: str) -> bool:
    pid, _, started = owner.partition(":")
    return str(process_started(int(pid))) == started


def repair_rwlock(root: Path) -> list[str]:
    """Drop entries of processes that are gone, or that only share the number of one that is gone."""
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        written = path.stat().st_mtime
        lock: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        path.unlink()
        return ["removed DVC's rwlock, cut in half by a kill"]
    writers = {p: i for p, i in lock.get("write", {}).items() if _holds(i["pid"], written)}
    readers = {
        p: [i for i in infos if _holds(i["pid"], written)] for p, infos in lock.get("read", {}).items()
    }
    readers = {p: infos for p, infos in readers.items() if infos}
    kept = {k: v for k, v in {"write": writers, "read": readers}.items() if v}
    if kept == {k: v for k, v in lock.items() if v}:
        return []
    path.write_text(json.dumps(kept), encoding="utf-8")
    return ["released DVC locks held by processes that are gone"]


def refuse_dvc(root: Path) -> None:
    """Raises BusyError while a DVC command is at work: one by hand holds no lock of ours, and not DVC's own
    while its stage runs; DVC's rwlock names it."""
    path = root / ".dvc" / "tmp" / "rwlock"
    lock = json.loads(path.read_text(encoding="utf-8") or "{}") if path.is_file() else {}
    if any(holders for entries in lock.values() for holders in entries.values()):
        raise BusyError(f"a DVC command is at work in {root} (.dvc/tmp/rwlock): wait for it")


def _holds(pid: int, written: float) -> bool:
    """Whether a process that wrote an entry before `written` (seconds since 1970) can still be this one."""
    import psutil

    try:
        process = psutil.Process(pid)
        python = process.name().startswith(("python", "dvc", "longview", "pytest"))
        return pid != os.getpid() and python and process.create_time() <= written
    except psutil.Error:
        return False


def keep_lock_file(root: Path) -> None:
    """Copy a good dvc.lock aside: a `dvc` by hand writes it in place, and a kill then cuts it in half."""
    source, kept = root / "dvc.lock", work("dvc.lock.kept", base=root)
    if source.is_file() and _readable(source):
        part = kept.with_name(kept.name + ".part")
        shutil.copyfile(source, part)
        part.replace(kept)


def restore_lock_file(root: Path) -> list[str]:
    """Put the copy back if dvc.lock cannot be read; the stage being recorded comes from DVC's run cache."""
    path, kept = root / "dvc.lock", work("dvc.lock.kept", base=root)
    if not path.is_file() or _readable(path):
        return []
    if kept.is_file():
        shutil.copyfile(kept, path)
        return ["dvc.lock was cut in half by a kill: put back the copy of the last run"]
    path.unlink()
    return ["dvc.lock was cut in half by a kill: removed; finished stages come from DVC's run cache"]


def _readable(path: Path) -> bool:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):
        return False
    return isinstance(data, dict) and isinstance(data.get("stages", {}), dict) and "schema" in data


def main() -> None:
    """Clean up and say what was done."""
    from flows.environment import root

    with exclusive(root()) as done:
        print("\n".join(done) or "nothing to clean up")


if __name__ == "__main__":
    main()
