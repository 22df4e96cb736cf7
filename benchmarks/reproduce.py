"""Two runs from two fresh clones with the same seed: is every data set and checkpoint the same?

    python -m benchmarks.reproduce [--save]           # two whole pipelines, one after the other
    python -m benchmarks.reproduce --against DIR      # one, against a clone that has run `make demo`
    python -m benchmarks.reproduce --kill 6           # the second is killed six times on its way
    python -m benchmarks.reproduce --profile tiny     # a quick one

Each clone builds its own data and trains every stage; neither shares a cache, a lock or an MLflow store.
Compared is the md5 of every output that DVC records. Exit status 1 if one differs; its files are named.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import results, workspace
from benchmarks.results import Row, Table
from benchmarks.workspace import WorkspaceError
from flows import pipeline, profile, supervise
from tasks import params

RUNS = ("first", "second")
FLOW = ("flows.cli",)
MINUTES = 25.0  # of a run whose length is not known, to spread kills over
SHOWN = 5  # differing files named per output


def outputs(folder: Path) -> dict[str, str]:
    """Output -> md5 of every stage in dvc.lock, and of the source data."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    lock = yaml.load((folder / "dvc.lock").read_text(encoding="utf-8"))
    pointer = yaml.load((folder / "data.dvc").read_text(encoding="utf-8"))
    return recorded([pointer, *lock["stages"].values()])


def recorded(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Output -> md5 of DVC's entries."""
    return {out["path"]: str(out["md5"]) for entry in entries for out in entry.get("outs", [])}


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Outputs that only one run has, or whose md5s differ."""
    return sorted(path for path in {*first, *second} if first.get(path) != second.get(path))


def differing_files(first: Path, second: Path) -> list[str]:
    """Files below two folders that are not the same, relative to them."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (first, second)
        for path in ([folder] if folder.is_file() else folder.rglob("*"))
        if path.is_file()
    }
    return sorted(name for name in names if not _same(first / name, second / name))


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def checkpoints(folder: Path, paths: Sequence[str]) -> list[str]:
    """The outputs that hold weights."""
    return [path for path in paths if next((folder / path).rglob("*.safetensors"), None)]


def run_once(
    folder: Path, seed: int, profile_name: str | None, rounds: int | None, kills: Sequence[float] = ()
) -> tuple[float, int]:
    """A fresh clone with everything run by `dvc repro`, or by the flow, killed after each of `kills` seconds
    since its last start; returns the minutes it took and how often it was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    workspace.make(folder, seed, profile_name=profile_name, rounds=rounds)
    killed = sum(kill_after(folder, seconds, whole=turn % 2 == 0) for turn, seconds in enumerate(kills))
    workspace.execute(folder, [*FLOW, "run"] if kills else ["dvc", "repro"])
    if stale := workspace.waiting(folder):
        raise WorkspaceError(f"{', '.join(stale)} are stale after the run in {folder}")
    stages = {stage.name for stage in pipeline.stages(folder)}
    minutes = (time.monotonic() - began) / 60
    print(f"{folder.name} run: {len(stages)} stages in {minutes:.1f} min", flush=True)
    return minutes, killed


def moments(kills: int, minutes: float, seed: int) -> list[float]:
    """Seconds from a start to the kill that ends it, random, spread over a run of `minutes`."""
    draw = random.Random(seed)
    return [minutes * 60 / (kills + 1) * draw.uniform(0.3, 1.7) for _ in range(kills)]


def kill_after(folder: Path, seconds: float, *, whole: bool) -> bool:
    """Start the flow in `folder` and end it by SIGKILL: the flow itself (`whole`), or the stage under it.
    False if it ended before."""
    import psutil

    log = folder / ".work" / "logs" / "killed.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        flow = psutil.Popen(
            [sys.executable, "-m", *FLOW, "run"],
            cwd=folder,
            env=workspace.environment(folder),
            stdout=said,
            stderr=said,
            preexec_fn=supervise.die_with_parent,
        )
        try:
            if flow.wait(seconds) != 0:
                raise WorkspaceError(f"the run in {folder} failed before it was killed: see {log}")
        except psutil.TimeoutExpired:
            stage = None if whole else stage_of(flow)
            with suppress(psutil.NoSuchProcess):  # it ended this instant: the flow is killed below
                if stage:
                    stage.kill()
                    flow.wait()
            print(f"killed after {seconds:.0f} s: {'the stage' if stage else 'the flow'}", flush=True)
            return True
        finally:
            with suppress(psutil.NoSuchProcess):
                flow.kill()
                flow.wait()
    print(f"ended before {seconds:.0f} s: not killed", flush=True)
    return False


def stage_of(flow: Any) -> Any:
    """The process of the stage that runs under the flow, or None between two stages."""
    import psutil

    for process in flow.children(recursive=True):
        with suppress(psutil.Error):
            module = process.cmdline()[2:3]
            if module and module[0].startswith("tasks.") and module != ["tasks.recorder"]:
                return process
    return None


def accept(folder: Path, seed: int, profile_name: str | None) -> None:
    """Raise WorkspaceError unless the whole pipeline has run in `folder`, with this seed and profile."""
    values = params.read(folder / "params.yaml")
    held = (values.get("seed"), values.get("profile"))
    if held != (seed, profile_name or params.read(results.ROOT / "params.yaml").get("profile")):
        raise WorkspaceError(f"{folder} has seed {held[0]} and profile {held[1]}: give the same here")
    if stale := workspace.waiting(folder):
        raise WorkspaceError(f"{', '.join(stale)} are stale in {folder}: run the pipeline there")


def judge(
    found: Sequence[Mapping[str, str]], weights: Sequence[str], minutes: Sequence[float]
) -> tuple[list[Row], Table]:
    """Rows and the table of two runs. weights: outputs that hold checkpoints."""
    first, second = found
    wrong = differing(first, second)
    everything = sorted({*first, *second})
    groups = {
        "data sets and reports": [path for path in everything if path not in weights],
        "checkpoints": list(weights),
    }
    rows = [
        Row(f"{name} with the same md5 in both runs", len(paths) - len(set(paths) & set(wrong)),
            f"of {len(paths)}", f"= {len(paths)}", bool(paths) and not set(paths) & set(wrong))
        for name, paths in groups.items()
    ]  # fmt: skip
    rows += [
        Row(f"whole pipeline from a fresh clone, {name} run", round(value, 1), "minutes")
        for name, value in zip(RUNS[-len(minutes) :], minutes, strict=True)
    ]
    cells = [
        [path, "checkpoint" if path in weights else "data", *(of.get(path, "–")[:12] for of in found),
         "NO" if path in wrong else "yes"]
        for path in everything
    ]  # fmt: skip
    return rows, Table("Outputs of two runs", ("Output", "Holds", *RUNS, "Same"), cells)


def explain(folders: Sequence[Path], wrong: Sequence[str]) -> None:
    """Name the files that differ in each differing output."""
    for path in wrong:
        names = differing_files(*(folder / path for folder in folders))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(f"differs: {path}: {', '.join(names[:SHOWN])}{more}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", help="a file of profiles/ by name (default: the committed params.yaml)")
    parser.add_argument("--rounds", type=int, help="preference rounds T")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a clone in which the pipeline has run, for the first run"
    )
    parser.add_argument(
        "--kill", type=int, default=0, metavar="N", help="kill the second run N times, flow and stage in turn"
    )
    parser.add_argument("--keep", action="store_true", help="leave the two clones in .work/reproduce")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args()


def main() -> int:
    """Run the pipeline twice and compare."""
    args, home = arguments(), results.ROOT / ".work" / "reproduce"
    if changed := results.uncommitted():
        print(
            f"note: clones are of the commit; uncommitted and left out: {', '.join(changed)}", file=sys.stderr
        )
    folders = [home / name for name in RUNS]
    try:
        with workspace.alone(home):
            fresh = folders
            if args.against:
                folders[0], fresh = args.against.resolve(), folders[1:]
                accept(folders[0], args.seed, args.profile)
            minutes: list[float] = []
            for folder in fresh:
                last = folder is folders[-1]
                kills = moments(args.kill, minutes[0] if minutes else MINUTES, args.seed) if last else []
                took, killed = run_once(folder, args.seed, args.profile, args.rounds, kills)
                minutes.append(took)
            found = [outputs(folder) for folder in folders]
            wrong = differing(*found)
            explain(folders, wrong)
            rows, table = judge(found, checkpoints(folders[0], sorted(found[0])), minutes)
            if args.kill:
                held = killed == args.kill
                rows.append(Row("kills of the second run", killed, "kills", f"= {args.kill}", held))
            name = "-".join(filter(None, ["reproduce", args.profile, "killed" if args.kill else None]))
            status = results.finish(name, rows, [results.row_table(name, rows), table], args.save)
            if not args.keep and not wrong:
                for folder in fresh:
                    shutil.rmtree(folder, ignore_errors=True)
            return status
    except (WorkspaceError, pipeline.PipelineError, profile.ProfileError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
