"""What a client adds to the calls themselves: 6,400 of 50 ms with 160 in flight cannot take less than 2 s.

    python -m benchmarks.client_overhead [--save]
    python -m benchmarks.client_overhead --peers curator --rounds 3
    python -m benchmarks.client_overhead --peers --calls 640 --in-flight 16      # ours alone, quickly

The server is benchmarks.mock_server in a process of its own. It takes 0.1 ms of CPU a call, on another core
if there are two; what it and the loopback take from the floor shows in the client that does nothing but send
and read (benchmarks/peers/bare.py). Every client runs in a process of its own, on an empty folder; measured
is from the first call prepared to the last answer on disk, what a client imports at its top left out. Ours
takes turns with the others, which get one turn each.

Peers: datatrove (its inference runner with checkpoints, and without), bespokelabs-curator and distilabel,
each in an environment of its own in .work/peers, built once from pinned versions. One that cannot be
installed or run is a row without a value that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.environments import HOME, SCRIPTS, PeerError, interpreter, last_line
from benchmarks.mock_server import MockServer
from benchmarks.results import ROOT, Row, Table

ENVIRONMENTS = ("datatrove", "curator", "distilabel")
DELAY_S = 0.05
RUN_S = 300
WALL, CPU = 1.15, 0.3
"""Targets: wall time as a multiple of the floor, ms of CPU a call."""


@dataclass(frozen=True)
class Client:
    """environment: of ENVIRONMENTS; None: this one. options: further arguments of its script."""

    name: str
    script: str
    environment: str | None = None
    options: tuple[str, ...] = ()


BARE = Client("bare loop", "bare.py")
OURS = Client("longview", "ours.py")
CHAINS = Client("longview, chains with images", "ours.py", None, ("chains",))
PEERS = (
    Client("datatrove with checkpoints", "datatrove_peer.py", "datatrove"),
    Client("curator", "curator_peer.py", "curator"),
    Client("distilabel", "distilabel_peer.py", "distilabel"),
    Client("datatrove without checkpoints", "datatrove_peer.py", "datatrove", ("plain",)),
)


@dataclass(frozen=True)
class Run:
    """One run of a client. done: calls whose answer it holds in the end."""

    wall_s: float
    cpu_s: float
    done: int


@dataclass(frozen=True)
class Load:
    """What every client is given to do."""

    calls: int
    in_flight: int

    @property
    def floor_s(self) -> float:
        """No client is faster."""
        return -(-self.calls // self.in_flight) * DELAY_S


def run(client: Client, load: Load) -> Run:
    """One run against a fresh server. Raises PeerError unless every call was answered."""
    python = interpreter(client.environment) if client.environment else Path(sys.executable)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not client.environment:
        environment["PYTHONPATH"] = str(ROOT)
    HOME.mkdir(parents=True, exist_ok=True)
    with MockServer(DELAY_S) as server, tempfile.TemporaryDirectory(dir=HOME, prefix="run-") as folder:
        words = [server.url, str(load.calls), str(load.in_flight), folder, *client.options]
        command = [str(python), str(SCRIPTS / client.script), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=RUN_S, env=environment, cwd=folder
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"{client.name} had not ended after {RUN_S} s") from None
    return parse(client.name, done.returncode, done.stdout, done.stderr, load.calls)


def parse(name: str, status: int, stdout: str, stderr: str, calls: int) -> Run:
    """What a script said in its last line. Raises PeerError."""
    if status != 0 or not stdout.strip():
        raise PeerError(f"{name} failed: {last_line(stderr)}")
    found = Run(**json.loads(stdout.strip().splitlines()[-1]))
    if found.done != calls:
        raise PeerError(f"{name} answered {found.done:,} of {calls:,} calls")
    return found


def measure(peers: Sequence[Client], load: Load, rounds: int) -> dict[Client, list[Run] | PeerError]:
    """Runs by client: ours and the bare loop in every round, the peers one after another between them."""
    found: dict[Client, list[Run] | PeerError] = {client: [] for client in (BARE, OURS, CHAINS, *peers)}
    left = list(peers)
    for turn in range(rounds):
        last = turn == rounds - 1
        guests, left = (left, []) if last else (left[:1], left[1:])
        for client in (BARE, OURS, CHAINS, *guests):
            try:
                one = run(client, load)
            except PeerError as error:
                if not client.environment:
                    raise
                print(error, file=sys.stderr, flush=True)
                found[client] = error
                continue
            runs = found[client]
            assert isinstance(runs, list)
            runs.append(one)
            print(f"{client.name}: {one.wall_s:.2f} s, {_cpu_ms(one, load):.2f} ms of CPU a call", flush=True)
    return found


def _cpu_ms(one: Run, load: Load) -> float:
    return 1e3 * one.cpu_s / load.calls


def _median(runs: Sequence[Run], load: Load) -> Run:
    return Run(
        statistics.median(r.wall_s for r in runs), statistics.median(r.cpu_s for r in runs), load.calls
    )


def judge(found: dict[Client, list[Run] | PeerError], load: Load) -> tuple[list[Row], Table]:
    """Rows, and the table of all clients."""
    rows: list[Row] = []
    ours = found[OURS]
    assert isinstance(ours, list)
    ours_s = _median(ours, load).wall_s
    cells = []
    for client, runs in found.items():
        if isinstance(runs, PeerError):
            rows.append(Row(f"{client.name}: {runs}", None, "s"))
            cells.append([client.name, "–", "–", "–", "–", "0"])
            continue
        one = _median(runs, load)
        wall, cpu = one.wall_s / load.floor_s, _cpu_ms(one, load)
        walls = sorted(r.wall_s for r in runs)
        spread = f"median of {len(runs)}, {walls[0]:.2f} to {walls[-1]:.2f} s"
        judged = client is OURS
        rows += [
            Row(f"{client.name}: wall time / floor of {load.floor_s:g} s ({spread})", wall, "×",
                *((f"≤ {WALL}", wall <= WALL) if judged else ())),
            Row(f"{client.name}: client CPU a call", cpu, "ms",
                *((f"≤ {CPU}", cpu <= CPU) if judged else ())),
        ]  # fmt: skip
        if client.environment:
            rows.append(Row(f"{client.name}: wall time / ours", one.wall_s / ours_s, "×"))
        cells.append([client.name, f"{one.wall_s:.2f}", f"{wall:.2f}", f"{one.wall_s / ours_s:.1f}",
                      f"{cpu:.2f}", str(len(runs))])  # fmt: skip
    head = ("Client", "Wall s", "/ floor", "/ ours", "CPU ms a call", "Runs")
    caption = (
        f"{load.calls:,} calls of {1e3 * DELAY_S:g} ms, {load.in_flight} in flight; medians. "
        "The bare loop only sends and reads."
    )
    return rows, Table("Clients", head, cells, caption)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=6400)
    parser.add_argument("--in-flight", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5, help="runs of ours")
    parser.add_argument(
        "--peers", nargs="*", choices=ENVIRONMENTS, default=ENVIRONMENTS, help="none: ours alone"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args(words)
    if args.calls < 16 or args.calls % 16:
        parser.error("--calls: a multiple of 16, for 4 chains of 4 calls each a question")
    return args


def main() -> int:
    """Run every client and compare."""
    args = arguments()
    load = Load(args.calls, args.in_flight)
    peers = [client for client in PEERS if client.environment in args.peers]
    for left in HOME.glob("run-*"):  # of a benchmark that was killed
        shutil.rmtree(left, ignore_errors=True)
    rows, table = judge(measure(peers, load, args.rounds), load)
    return results.finish(
        "client-overhead", rows, [results.row_table("client-overhead", rows), table], args.save
    )


if __name__ == "__main__":
    sys.exit(main())
