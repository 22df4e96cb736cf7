"""What running the pipeline costs beside its stages: with nothing to do, and with stages that do nothing.

    python -m benchmarks.orchestration [--repetitions 5] [--save]

The project is a clone of this checkout's commit: its real dvc.yaml, with the same stages, dependencies (code
and parameters too), outputs and rounds. Only the commands are replaced, by `mkdir` and `touch`: the stages
themselves take half an hour. Tracking is off, and `longview up`'s Prefect server of the clone is running.

Measured is each command from its start to its exit, all of them in turns:
- up to date: no stage is to run;
- executed: dvc.lock and DVC's run cache are gone, so every stage runs. The time above that of the bare
  commands, divided by the stages, is the overhead a stage; the start of the flow engine is in it.

Beside ours: `dvc repro` alone; plain Prefect (benchmarks/peers/prefect_peer.py: one task a stage, each
`dvc repro --single-item`) on the same server; Dagster and Metaflow (benchmarks/peers/), which run the stages'
commands by themselves: they neither hash inputs nor keep versions of outputs, and run every stage each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results, workspace
from benchmarks.environments import SCRIPTS, interpreter, last_line
from benchmarks.results import ROOT, Row, Table
from flows import pipeline
from flows.environment import server_url

NO_OP_S, STAGE_S = 3.0, 1.0
"""Targets: seconds of a run with nothing to do, seconds of overhead a stage that is executed."""
INSIDE = ("base", "checkpoint", "generator")
"""Folders of an output that other stages depend on by themselves."""
RUN_S = 300
SETTINGS = {"LONGVIEW_TRACKING": "off"}


@dataclass(frozen=True)
class Runner:
    """A command that runs the pipeline; "STAGES" stands for the names of all stages, "COMMANDS" for a file
    with their names and commands."""

    name: str
    words: tuple[str, ...]
    peer: str | None = None
    """The environment whose Python runs it; None for ours."""

    @property
    def versions(self) -> bool:
        """Whether it knows what is up to date."""
        return self.peer is None

    def command(self, names: Sequence[str], commands: Path) -> list[str]:
        """The whole command."""
        python = sys.executable if self.peer is None else str(interpreter(self.peer))
        filled = {"STAGES": list(names), "COMMANDS": [str(commands)]}
        return [python, *(word for w in self.words for word in filled.get(w, [w]))]


OURS = Runner("longview run", ("-m", "flows.cli", "run"))
DVC = Runner("dvc repro", ("-m", "dvc", "repro"))
PREFECT = Runner("plain Prefect", (str(SCRIPTS / "prefect_peer.py"), "STAGES"))
DAGSTER = Runner("Dagster", (str(SCRIPTS / "dagster_peer.py"), "COMMANDS"), "dagster")
METAFLOW = Runner("Metaflow", (str(SCRIPTS / "metaflow_peer.py"), "COMMANDS"), "metaflow")
RUNNERS = (OURS, DVC, PREFECT, DAGSTER, METAFLOW)


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition, and of the bare commands of all stages beside them; `up_to_date` is empty
    for a runner that runs every stage each time."""

    up_to_date: list[float]
    executed: list[float]
    bare: list[float]

    def overhead(self, stages: int) -> float:
        """Seconds a stage above those of its command, of the medians."""
        return (statistics.median(self.executed) - statistics.median(self.bare)) / stages


def trivial(stage: Mapping[str, Any]) -> str:
    """The command that makes a stage's outputs, with all in them that other stages ask for."""
    folders = " ".join(f"{out}/{name}" for out in stage["outs"] for name in INSIDE)
    files = " ".join(f"{out}/{name}/file" for out in stage["outs"] for name in INSIDE)
    return f"mkdir -p {folders} && touch {files}"


def without_work(text: str) -> str:
    """dvc.yaml with trivial commands and everything else as it was."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    found = yaml.load(text)
    for entry in found["stages"].values():
        stage = entry.get("do", entry)
        stage["cmd"] = trivial(stage)
    out = StringIO()
    yaml.dump(found, out)
    return out.getvalue()


@contextmanager
def project(folder: Path) -> Iterator[Path]:
    """The clone, its stages without work, its servers running for the length of the block."""
    workspace.make(folder, seed=0)
    path = folder / "dvc.yaml"
    path.write_text(without_work(path.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        _servers(folder, "up")  # not under the supervisor, which would end them with the command
        yield folder
    finally:
        _servers(folder, "down")


def _servers(folder: Path, command: str) -> None:
    environment = workspace.environment(folder, SETTINGS)
    subprocess.run([sys.executable, "-m", "flows.cli", command], cwd=folder, env=environment, check=True)


def forget(folder: Path) -> None:
    """Make every stage stale, and its result unknown to DVC."""
    for path in (folder / "dvc.lock", folder / ".work" / "dvc.lock.kept"):
        path.unlink(missing_ok=True)
    for path in (folder / ".dvc" / "cache" / "runs", folder / "artifacts"):
        shutil.rmtree(path, ignore_errors=True)


def timed(folder: Path, command: Sequence[str]) -> float:
    """Seconds from the start of a command to its exit. Raises WorkspaceError if it fails."""
    url = server_url("prefect", folder)
    if url is None:
        raise workspace.WorkspaceError(f"no Prefect server is running in {folder}")
    environment = workspace.environment(folder, {**SETTINGS, "PREFECT_API_URL": f"{url}/api"})
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=RUN_S
        )
        seconds = time.perf_counter() - began
        output.seek(0)
        if done.returncode != 0:
            raise workspace.WorkspaceError(f"`{' '.join(command)}` failed: {last_line(output.read())}")
    return seconds


def measure(folder: Path, repetitions: int) -> tuple[dict[Runner, Times], int]:
    """Times by runner, taken in turns, and the number of stages."""
    stages = pipeline.stages(folder)
    names = [stage.name for stage in stages]
    commands = folder / ".work" / "commands.json"
    commands.write_text(json.dumps([[stage.name, trivial({"outs": stage.outs})] for stage in stages]))
    found = {runner: Times([], [], []) for runner in RUNNERS}
    for _ in range(repetitions):
        for runner, times in found.items():
            command = runner.command(names, commands)
            forget(folder)
            times.executed.append(timed(folder, command))
            if runner.versions:
                if pipeline.pending(folder, names):
                    raise workspace.WorkspaceError(f"{runner.name} left stages that are not up to date")
                times.up_to_date.append(timed(folder, command))
            elif missing := [out for stage in stages for out in stage.outs if not (folder / out).is_dir()]:
                raise workspace.WorkspaceError(f"{runner.name} did not make {', '.join(missing)}")
            times.bare.append(bare(folder, len(names)))
            no_op = f"{times.up_to_date[-1]:.2f} s up to date, " if runner.versions else ""
            print(f"{runner.name}: {no_op}{times.executed[-1]:.2f} s executed", flush=True)
    return found, len(names)


def bare(folder: Path, stages: int) -> float:
    """Seconds that the commands of so many stages take by themselves."""
    with tempfile.TemporaryDirectory(dir=folder / ".work") as scratch:
        command = ["sh", "-c", trivial({"outs": [f"{scratch}/out"]})]
        return sum(timed(folder, command) for _ in range(stages))


def judge(found: Mapping[Runner, Times], stages: int) -> tuple[list[Row], Table]:
    """Rows, and the table of all runners."""
    rows: list[Row] = []
    cells = []
    for runner, times in found.items():
        overhead, ours = times.overhead(stages), runner is OURS
        count = f"median of {len(times.executed)}"
        known = ["", ""]
        if times.up_to_date:
            no_op = statistics.median(times.up_to_date)
            known = [f"{no_op:.2f}", _spread(times.up_to_date)]
            rows.append(
                Row(f"{runner.name}: {stages} stages up to date ({count}, {known[1]})", no_op,
                    "s", *((f"≤ {NO_OP_S:g}", no_op <= NO_OP_S) if ours else ()))
            )  # fmt: skip
        rows.append(
            Row(f"{runner.name}: overhead a stage executed ({count}, {_spread(times.executed)} in all)",
                overhead, "s", *((f"≤ {STAGE_S:g}", overhead <= STAGE_S) if ours else ()))
        )  # fmt: skip
        cells.append([runner.name, *known, f"{overhead:.2f}", _spread(times.executed)])
    head = ("Runner", "Up to date s", "Spread", "Overhead a stage s", "All executed, spread")
    return rows, Table("Runners", head, cells, f"{stages} stages of trivial commands; medians.")


def _spread(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f} s"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if args.repetitions < 1:
        parser.error("--repetitions: 1 or more")
    return args


def main() -> int:
    """Run every runner in turns and compare."""
    args = arguments()
    (ROOT / ".work").mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=ROOT / ".work", prefix="orchestration-") as home,
        project(Path(home) / "project") as folder,
    ):
        rows, table = judge(*measure(folder, args.repetitions))
    tables = [results.row_table("orchestration", rows), table]
    return results.finish("orchestration", rows, tables, args.save)


if __name__ == "__main__":
    sys.exit(main())
