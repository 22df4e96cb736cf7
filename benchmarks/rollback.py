"""Going back to an earlier run: seconds, against linking the same files and against what people type today.

    python -m benchmarks.rollback [--versions 10] [--repetitions 5] [--save]
    python -m benchmarks.rollback --versions 3 --images 30000 --checkpoint-mb 200   # ten times as large

The project is as large as the embedded profile's: 3,000 images, T + 2 checkpoints (T = 3) of 20 MB and their
derived sets, of random bytes; its stages write them and do nothing else. Ten runs are made, each on data of
which a tenth is new, pushed to a remote and recorded as versions. Then the checkout goes from the last run to
the first and back, in turns:
- ours: `longview data rollback RUN`, from process start to exit, its checks before and after included;
- by hand: `git checkout RUN -- dvc.lock params.yaml data.dvc`, then `dvc checkout`;
- by hand, checked: `dvc status` before (is something edited?) and after (is it all there?), as ours does;
- bound: the files that differ between the two runs removed and copied from the cache, in one process.

Retraining is 18.0 minutes: the whole embedded pipeline by `dvc repro` on two cores (README, commit f1e9301).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import ROOT, Row, Table
from flows import data, objects, versions
from flows.versions import Facts, RunVersion

RETRAIN_S = 18.0 * 60
SHARE, TIMES, DISK = 0.01, 3.0, 1.05
"""Targets: of retraining, of the bound, of the unique bytes."""
IMAGES, IMAGE_BYTES, CHECKPOINT_MB, SET_BYTES, ROUNDS = 3000, 1500, 20, 1 << 20, 3
STAGE = """
import random, sys
from pathlib import Path

name, out, size, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
out.mkdir(parents=True, exist_ok=True)
(out / "content").write_bytes(random.Random(f"{name} {seed}").randbytes(size))
"""


@dataclass(frozen=True)
class Size:
    """Number of images, and MB of a checkpoint."""

    images: int = IMAGES
    checkpoint_mb: int = CHECKPOINT_MB

    @property
    def name(self) -> str:
        """Of the results: `rollback`, or with the size if it is another."""
        return "rollback" if self == Size() else f"rollback-{self.images}"


def pipeline_yaml(size: Size) -> str:
    """Every stage depends on the one before it and on data/."""
    names = ["instruct", "foundation", "curate", "reasoning_sft", "summary_sft"]
    names += [f"{kind}_r{t}" for t in range(1, ROUNDS + 1) for kind in ("sample", "dpo")]
    lines, before = ["stages:"], "data"
    for name in names:
        trained = name in ("foundation", "reasoning_sft", "summary_sft") or name.startswith("dpo")
        count = size.checkpoint_mb << 20 if trained else SET_BYTES
        lines += [
            f"  {name}:",
            f"    cmd: python stage.py {name} artifacts/{name} {count} ${{seed}}",
            f"    deps: [data, {before}, stage.py]" if before != "data" else "    deps: [data, stage.py]",
            "    params: [seed]",
            f"    outs: [artifacts/{name}]",
        ]
        before = f"artifacts/{name}"
    return "\n".join(lines) + "\n"


def make(folder: Path, count: int, size: Size) -> list[RunVersion]:
    """The project after so many runs."""
    (folder / "data").mkdir(parents=True)
    (folder / "stage.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(pipeline_yaml(size))
    (folder / ".gitignore").write_text("/data\n/artifacts\n/.work\n/.remote\n")
    git(folder, "init", "-q")
    dvc(folder, "init", "-q")
    dvc(folder, "remote", "add", "-q", "-d", "local", str(folder / ".remote"))
    (folder / "params.yaml").write_text("seed: 0\nrounds: {}\n")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=b", "-c", "user.email=b@example.org", "commit", "-qm", "project")
    made = []
    for number in range(count):
        step = size.images if number == 0 else size.images // 10
        for image in range(step):
            name = image if number == 0 else (number * step + image) % size.images
            (folder / f"data/{name:05}.png").write_bytes(os.urandom(IMAGE_BYTES))
        (folder / "params.yaml").write_text(f"seed: {number}\nrounds: {{}}\n")
        dvc(folder, "add", "-q", "data")
        dvc(folder, "repro", "-q")
        dvc(folder, "push", "-q")
        run = versions.record(folder, Facts(str(data.version(folder)), "benchmark"))
        assert run
        made.append(run)
        print(f"run {number + 1} of {count}: {run.tag}", flush=True)
    return made


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True)


def dvc(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, env=environment(folder), check=True)


def environment(folder: Path) -> dict[str, str]:
    """This checkout's code on that project."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LONGVIEW_ROOT": str(folder),
        "LONGVIEW_TRACKING": "off",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def ours(folder: Path, run: RunVersion) -> None:
    command = [sys.executable, "-m", "flows.cli", "data", "rollback", run.tag]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)


def by_hand(folder: Path, run: RunVersion) -> None:
    git(folder, "checkout", "-q", run.tag, "--", "dvc.lock", "params.yaml", "data.dvc")
    dvc(folder, "checkout", "-q")
    git(folder, "reset", "-q")


def by_hand_checked(folder: Path, run: RunVersion) -> None:
    dvc(folder, "status", "-q")
    by_hand(folder, run)
    dvc(folder, "status", "-q")


def copies(folder: Path, before: RunVersion, after: RunVersion) -> list[tuple[Path, Path]]:
    """(object in the cache, file of the workspace) for what differs between two runs."""
    with objects.opened(folder) as stored:

        def files(run: RunVersion) -> Iterator[tuple[str, str]]:
            outs = [o for s in versions.lock(folder, run)["stages"].values() for o in s["outs"]]
            for path, md5 in [("data", run.data), *((o["path"], o["md5"]) for o in outs)]:
                yield from ((f"{path}/{name}", one) for name, one in (stored.listing(md5) or {}).items())

        there = dict(files(before))
        return [(stored.path(md5), folder / name) for name, md5 in files(after) if there.get(name) != md5]


def bound(pairs: Sequence[tuple[Path, Path]]) -> None:
    for source, target in pairs:
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)


def measure(folder: Path, runs: Sequence[RunVersion], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way, both directions, in turns."""
    first, last = runs[0], runs[-1]
    found: dict[str, list[float]] = {"ours": [], "by hand": [], "by hand, checked": [], "bound": []}
    for _ in range(repetitions):
        for target, source in ((first, last), (last, first)):
            pairs = copies(folder, source, target)
            for name, go in (
                ("ours", lambda run=target: ours(folder, run)),
                ("by hand", lambda run=target: by_hand(folder, run)),
                ("by hand, checked", lambda run=target: by_hand_checked(folder, run)),
                ("bound", lambda some=pairs: bound(some)),
            ):
                ours(folder, source)
                os.sync()  # what that wrote is not for this one to wait for
                began = time.perf_counter()
                go()
                found[name].append(time.perf_counter() - began)
                print(f"{name}: {found[name][-1]:.2f} s", flush=True)
        ours(folder, last)
    return found


def disk(folder: Path, runs: Sequence[RunVersion]) -> tuple[int, int]:
    """Bytes of the cache, and of the different files of all runs."""
    cache = sum(f.stat().st_size for f in (folder / ".dvc/cache").rglob("*") if f.is_file())
    unique: dict[str, int] = {}
    with objects.opened(folder) as stored:
        for run in runs:
            outs = [o["md5"] for s in versions.lock(folder, run)["stages"].values() for o in s["outs"]]
            for md5 in (run.data, *outs):
                for one in (stored.listing(md5) or {}).values():
                    unique.setdefault(one, stored.path(one).stat().st_size)
    return cache, sum(unique.values())


def judge(
    found: dict[str, list[float]], sizes: tuple[int, int], runs: int, size: Size
) -> tuple[list[Row], Table]:
    """Rows, and the table of all ways. What retraining takes is known for the embedded profile's size."""
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    mine = medians["ours"]
    share, times, used = mine / RETRAIN_S, mine / medians["bound"], sizes[0] / sizes[1]
    own = Row("of the time to retrain (18.0 min)", share, "", f"≤ {SHARE}", share <= SHARE)
    rows = [
        Row(
            f"longview data rollback, {size.images:,} images, {size.checkpoint_mb} MB a checkpoint", mine, "s"
        ),
        *([own] if size == Size() else []),
        Row("of the bound: copying the same files", times, "×", f"≤ {TIMES:g}", times <= TIMES),
        Row("git checkout and dvc checkout by hand / ours", medians["by hand"] / mine, "×"),
        Row("the same with dvc status before and after / ours", medians["by hand, checked"] / mine, "×"),
        Row(f"disk of {runs} runs / their unique bytes", used, "×", f"≤ {DISK}", used <= DISK),
    ]
    cells = [[name, f"{medians[name]:.2f}", f"{min(s):.2f} to {max(s):.2f}"] for name, s in found.items()]
    return rows, Table("Ways back", ("Way", "Seconds", "Spread"), cells, "Medians, both directions.")


def arguments(words: Sequence[str] | None = None) -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--checkpoint-mb", type=int, default=CHECKPOINT_MB)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if args.versions < 2 or min(args.repetitions, args.checkpoint_mb) < 1 or args.images < 10:
        parser.error("--versions: 2 or more; --repetitions, --checkpoint-mb: 1 or more; --images: 10 or more")
    return args


def main() -> int:
    """Make the runs, go back and forth, compare."""
    args = arguments()
    size = Size(args.images, args.checkpoint_mb)
    (ROOT / ".work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".work", prefix="rollback-") as home:
        folder = Path(home) / "project"
        runs = make(folder, args.versions, size)
        found = measure(folder, runs, args.repetitions)
        rows, table = judge(found, disk(folder, runs), len(runs), size)
    return results.finish(size.name, rows, [results.row_table(size.name, rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
