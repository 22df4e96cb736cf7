"""Sampling from 10⁴ to 10⁶ chains: is memory flat, and time linear?

    python -m benchmarks.chains_memory [--save]
    python -m benchmarks.chains_memory --chains 1000 10000
    python -m benchmarks.chains_memory --one 10000              # in this process; prints JSON

Each size runs in a process of its own: the stage `generate` without what surrounds a stage, chains of two
steps and an answer from the engine without a model, the journal and the output on disk. The questions are
made as they are asked for, in an order that jumps about as a stage's does; a stage holds those it has read.
Memory is the most that was resident at a time (VmHWM), time the median of runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.results import ROOT, Row, Table

if TYPE_CHECKING:
    from models.records import Question

HOME = ROOT / ".work" / "chains_memory"
CHAINS = (10_000, 100_000, 1_000_000)
SAMPLES = 4
FEW, REPEATS = 100_000, 3
"""Sizes up to FEW chains are measured so often."""
RATIO = 1.2
"""Target: of memory, and of time a chain, between the fewest chains and the most."""
TEXT = "What is the sum of the digits in the top row of the board? Look at every cell. " * 5
STRIDE = 7919  # a prime


class Questions(Sequence[Any]):
    """So many of them, each made when it is asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Question:
        from models.records import Question

        number = place * STRIDE % self._count
        return Question(f"generate-{number:07d}", [f"images/{number}.png"], TEXT, "7")

    def __iter__(self) -> Iterator[Question]:
        return map(self.__getitem__, range(self._count))


@dataclass(frozen=True)
class Run:
    """One size, measured once. disk_mib: journal and output."""

    chains: int
    seconds: float
    peak_mib: float
    disk_mib: float


def run(chains: int, folder: Path) -> Run:
    """Sample so many chains in this process."""
    from models.engines.fake import FakeEngine
    from models.engines.journalled import JournalledEngine
    from models.engines.watched import WatchedEngine
    from models.journal import Journal
    from models.reasoning import Settings
    from tasks import generate
    from tasks.stage import StageRun

    p = generate.Params(chains // SAMPLES, SAMPLES, chain=Settings(prompts="short", min_steps=2))
    stage = StageRun("generate", folder / "out", folder / "scratch", None)
    began = time.perf_counter()
    with Journal(stage.scratch / "generator.journal") as journal:
        engine = JournalledEngine(WatchedEngine(FakeEngine()), journal)
        found = generate.run(p, 0, Questions(p.questions), engine, stage)
    seconds = time.perf_counter() - began
    if found["paths"] != p.questions * SAMPLES:
        raise RuntimeError(f"{found['paths']:,} of {p.questions * SAMPLES:,} chains were finished")
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Run(found["paths"], seconds, peak_mib(), disk / 2**20)


def peak_mib() -> float:
    """The most memory that this process has had resident."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")
    return int(found[1]) / 1024


def run_apart(chains: int) -> Run:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.chains_memory", "--one", str(chains)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    one = Run(**json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{chains:,} chains: {one.seconds:.1f} s, {1e6 * one.seconds / chains:.0f} µs each, "
        f"{one.peak_mib:.0f} MiB",
        flush=True,
    )
    return one


def judge(sizes: Sequence[Sequence[Run]]) -> tuple[list[Row], Table]:
    """Rows, and the table. sizes: the runs of each, the fewest chains first."""
    found = [
        Run(
            runs[0].chains,
            statistics.median(one.seconds for one in runs),
            max(one.peak_mib for one in runs),
            runs[0].disk_mib,
        )
        for runs in sizes
    ]
    few, many = found[0], found[-1]
    of = f"{many.chains:,} chains / {few.chains:,}"
    memory = many.peak_mib / few.peak_mib
    pace = (many.seconds / many.chains) / (few.seconds / few.chains)
    rows = [
        Row(f"peak memory, {of}", memory, "×", f"≤ {RATIO}", memory <= RATIO),
        Row(f"time a chain, {of}", pace, "×", f"≤ {RATIO}", pace <= RATIO),
    ]
    for one in found:
        rows += [
            Row(f"peak memory, {one.chains:,} chains", one.peak_mib, "MiB"),
            Row(f"time, {one.chains:,} chains", one.seconds, "s"),
        ]
    cells = [
        [f"{one.chains:,}", f"{one.peak_mib:.0f}", f"{one.seconds:.1f}",
         f"{1e6 * one.seconds / one.chains:.0f}", f"{one.disk_mib:,.0f}"]
        for one in found
    ]  # fmt: skip
    caption = "Chains of two steps and an answer, journalled; memory of the whole process."
    return rows, Table(
        "Chains", ("Chains", "Peak MiB", "Seconds", "µs a chain", "MiB on disk"), cells, caption
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, nargs="+", default=list(CHAINS))
    parser.add_argument("--one", type=int, metavar="CHAINS", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if any(chains < SAMPLES or chains % (SAMPLES * STRIDE) == 0 for chains in args.chains):
        parser.error(f"--chains: {SAMPLES} or more, and no multiple of {SAMPLES * STRIDE:,}")
    args.chains.sort()
    return args


def main() -> int:
    """Measure every size and compare."""
    args = arguments()
    HOME.mkdir(parents=True, exist_ok=True)
    if args.one:
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            print(json.dumps(asdict(run(args.one, Path(folder)))))
        return 0
    shutil.rmtree(HOME)  # what a killed one left
    sizes = [[run_apart(n) for _ in range(REPEATS if n <= FEW else 1)] for n in args.chains]
    rows, table = judge(sizes)
    return results.finish("chains-memory", rows, [results.row_table("chains-memory", rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
