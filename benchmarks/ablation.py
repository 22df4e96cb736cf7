"""Insight-V's ablation over several seeds: does every part of the pipeline earn its place?

    python -m benchmarks.ablation --seeds 3 [--save]             # an hour or two on two cores
    python -m benchmarks.ablation --from-artifacts . [--save]    # on a checkout in which the pipeline has run

Each seed runs the pipeline in a clone of its own (.work/ablation/seed-K), then trains and evaluates the
systems that only the ablation needs (benchmarks.systems). Killed at any time, the same command continues.
Exit status 1 if a target does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import pooling, results, systems, workspace
from benchmarks.workspace import WorkspaceError
from flows import pipeline, profile
from models.results import ResultsError, Rows
from tasks import params
from tasks.params import ParamsError

WORK = results.ROOT / ".work" / "ablation"
EXPECTED = (WorkspaceError, ResultsError, ParamsError, pipeline.PipelineError, profile.ProfileError)
UNTIL = "compare"  # promote and report are for people; nothing here reads them


@dataclass(frozen=True)
class Step:
    """A stage or a system of one seed. `kind`: steps of one kind take about as long."""

    seed: int
    name: str
    run: Callable[[], None]

    @property
    def kind(self) -> str:
        return self.name.partition("@")[0]


@dataclass
class Pace:
    """How long steps took, in this and earlier calls (kept in a file): the time left follows."""

    path: Path
    scale: str  # steps of another profile take another time
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.seconds = json.loads(self.path.read_text(encoding="utf-8"))

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Note how long the body takes, if it ends well."""
        began = time.monotonic()
        yield
        self.seconds.setdefault(f"{self.scale}/{kind}", []).append(round(time.monotonic() - began, 1))
        self.path.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")

    def left(self, kinds: Sequence[str]) -> str:
        """The time these steps will take, in words."""
        known = [
            statistics.median(held) for kind in kinds if (held := self.seconds.get(f"{self.scale}/{kind}"))
        ]
        if not known:
            return "time left unknown until steps have run once"
        prefix = "about" if len(known) == len(kinds) else "more than"
        return f"{prefix} {duration(sum(known))} left"


def duration(seconds: float) -> str:
    """1 h 05 min, 12 min, 40 s"""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def prepare(seeds: Sequence[int], profile_name: str | None, rounds: int | None) -> dict[int, Path]:
    """The workspace of each seed, brought to this commit."""
    made = {}
    for seed in seeds:
        print(f"seed {seed}: preparing {(WORK / f'seed-{seed}').relative_to(results.ROOT)}", flush=True)
        folder = WORK / f"seed-{seed}"
        made[seed] = workspace.make(folder, seed, profile_name=profile_name, rounds=rounds)
    return made


def adopt(folders: Sequence[Path]) -> dict[int, Path]:
    """Checkouts in which the whole pipeline has run, by the seed of their params.yaml."""
    found: dict[int, Path] = {}
    for folder in folders:
        missing = [
            system
            for system in ("base", "multi_agent", *profile.read_rounds(folder))
            if not (folder / "artifacts/evaluate" / system / "predictions.jsonl").is_file()
        ]
        if missing:
            raise WorkspaceError(f"{folder} has no predictions of {', '.join(missing)}: `dvc repro` there")
        seed = params.seed(folder / "params.yaml")
        if seed in found:
            raise WorkspaceError(f"{folder} and {found[seed]} have the same seed, {seed}")
        found[seed] = folder
    return found


@dataclass(frozen=True)
class Home:
    """Where the pipeline of a seed runs.

    A clone runs its own code, so that editing the checkout meanwhile is harmless. An adopted folder runs no
    stage, and the code of this checkout makes its systems.
    """

    folder: Path
    adopted: bool

    @property
    def code(self) -> Path:
        """The checkout whose code makes the systems."""
        return results.ROOT if self.adopted else self.folder

    def predictions(self, system: str) -> Path:
        """Where a system's predictions are once they are finished."""
        with chdir(self.folder):
            return systems.predictions_file(system, self.code).absolute()


def plan(homes: Mapping[int, Home]) -> list[Step]:
    """What is still to do, seed by seed: stages that are not up to date, then unfinished systems."""
    steps = []
    for seed, home in sorted(homes.items()):
        stages = [] if home.adopted else workspace.waiting(home.folder, UNTIL)
        steps += [Step(seed, name, _stage(home, name)) for name in stages]
        for system in systems.SYSTEMS:
            if stages or not home.predictions(system).is_file():
                steps.append(Step(seed, system, _system(home, system)))
    return steps


def _stage(home: Home, name: str) -> Callable[[], None]:
    return lambda: workspace.run_stage(home.folder, name, {"LONGVIEW_TRACKING": "off"})


def _system(home: Home, name: str) -> Callable[[], None]:
    return lambda: workspace.execute(home.folder, ["benchmarks.systems", name], code=home.code)


def walk(steps: Sequence[Step], pace: Pace) -> None:
    """Run the steps, one at a time, each under a line with the time left."""
    began = time.monotonic()
    for number, step in enumerate(steps, start=1):
        left = pace.left([s.kind for s in steps[number - 1 :]])
        gone = duration(time.monotonic() - began)
        print(f"\n[{number}/{len(steps)}] seed {step.seed}: {step.name} ({gone} gone, {left})", flush=True)
        with pace.timed(step.kind):
            step.run()


def load(home: Home, rounds: Sequence[str]) -> dict[str, Rows]:
    """Predictions of every system once all steps have run; WorkspaceError if something changed meanwhile."""
    from models.records import read_jsonl

    evaluated = home.folder / "artifacts/evaluate"
    files = {name: evaluated / name / "predictions.jsonl" for name in ("base", "multi_agent", *rounds)}
    files |= {system: home.predictions(system) for system in systems.SYSTEMS}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise WorkspaceError(
            f"{home.folder}: no predictions of {', '.join(missing)} for the present data, parameters and "
            "code, which must have changed during the run: call it again"
        )
    found: dict[str, Rows] = {name: list(read_jsonl(file)) for name, file in files.items()}
    for name in ("multi_agent", *rounds):
        found[f"reasoner_only@{name}"] = systems.reasoner_alone(found[name])
    return found


def run(homes: Mapping[int, Home]) -> tuple[list[results.Row], list[results.Table]]:
    """Do what is to do, then pool: rows and tables."""
    for home in homes.values():
        if home.adopted and (stale := workspace.waiting(home.folder, UNTIL)):
            raise WorkspaceError(f"{', '.join(stale)} are stale in {home.folder}: run the pipeline there")
    rounds = common_rounds({seed: home.folder for seed, home in homes.items()})
    profiles = {str(params.read(home.folder / "params.yaml").get("profile")) for home in homes.values()}
    walk(plan(homes), Pace(WORK / "pace.json", "+".join(sorted(profiles))))
    for seed, home in homes.items():
        if not home.adopted and (stale := workspace.waiting(home.folder, UNTIL)):
            raise WorkspaceError(f"seed {seed}: {', '.join(stale)} are stale after the run: call it again")
    predictions = {seed: load(home, rounds) for seed, home in sorted(homes.items())}
    tables = [pooling.accuracy_table(predictions, rounds, name) for name in pooling.SETS]
    tables.append(pooling.claim_table(predictions, rounds))
    return [*pooling.claim_rows(predictions, rounds), *pooling.accuracy_rows(predictions, rounds)], tables


def common_rounds(folders: Mapping[int, Path]) -> list[str]:
    """The rounds of params.yaml, the same in every folder."""
    found = {seed: profile.read_rounds(folder) for seed, folder in folders.items()}
    first = next(iter(found.values()))
    if any(rounds != first for rounds in found.values()):
        raise WorkspaceError(f"the seeds have different rounds: {found}")
    return first


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="seeds 0 to N-1 (3, or none with --from-artifacts)")
    parser.add_argument(
        "--from-artifacts", type=Path, nargs="+", default=[], metavar="DIR", help="checkouts used as they are"
    )
    parser.add_argument("--profile", help="a file of profiles/ by name (default: the committed params.yaml)")
    parser.add_argument("--rounds", type=int, help="preference rounds T")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    if args.seeds is None:
        args.seeds = 0 if args.from_artifacts else 3
    return args


def main() -> int:
    """Run the ablation."""
    args = arguments()
    if args.seeds and (changed := results.uncommitted()):
        print(
            f"note: clones are of the commit; uncommitted and left out: {', '.join(changed)}", file=sys.stderr
        )
    try:
        with workspace.alone(WORK):
            adopted = adopt([folder.resolve() for folder in args.from_artifacts])
            own = [seed for seed in range(args.seeds) if seed not in adopted]
            homes = {seed: Home(folder, adopted=True) for seed, folder in adopted.items()}
            for seed, folder in prepare(own, args.profile, args.rounds).items():
                homes[seed] = Home(folder, adopted=False)
            if not homes:
                raise WorkspaceError("nothing to do: --seeds 1 or more, or --from-artifacts")
            rows, tables = run(homes)
    except EXPECTED as error:
        sys.exit(str(error))
    name = "ablation" if args.profile is None else f"ablation-{args.profile}"
    return results.finish(name, rows, tables, args.save)


if __name__ == "__main__":
    sys.exit(main())
