"""The stage `generate` killed 20 times at random moments: what is asked twice, and is the output the same?

    python -m benchmarks.resume [--save]
    python -m benchmarks.resume --questions 40 --kills 3      # a quick one

The real stage, `python -m tasks.generate`, samples chains from a server without a model that answers after 5
to 35 ms, first undisturbed, then killed (SIGKILL) at random moments of its whole course, every fifth time
during its start-up, and started again each time. The server knows every call by what is in it, so it sees
which are asked again, and whether their answer had been sent before the kill:

- in flight: the answer had not been sent. No journal can save these.
- answered: it had been sent, but was not durable yet. These the journal has lost; it promises to lose none
  that is older than 50 ms.

Both together are, for each kill, what the server does in the time of a call and of a group commit. The share
that is redone is therefore about kills x (call + commit) / time, however many calls are in flight: what holds
here, with 20 kills within two minutes, holds for longer calls killed less often.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results, workspace
from benchmarks.mock_server import BACKLOG, Connection, Service, smallest
from benchmarks.results import ROOT, Row, Table
from flows import supervise
from models.records import Question, read_jsonl, write_jsonl

HOME = ROOT / ".work" / "resume"
OUT = Path("artifacts/generate")
STAGE = [sys.executable, "-m", "tasks.generate"]
DELAY_S = (0.005, 0.035)
CAPACITY, SAMPLES, MIN_STEPS, MAX_STEPS = 4, 4, 2, 6
REDONE, DURABLE_MS = 1.0, 50.0
"""Targets: % of all steps, and the age of the oldest answer lost."""
JITTER_S = 0.05
START_UP = 5
"""Every so many kills, one falls into the start-up."""
IMAGES = 8
KEY = "RESUME_START"
"""Variable that holds the key, which is the number of the start."""


class ResumeError(RuntimeError):
    """The stage did not do what the benchmark needs; the message says where its output is."""


@dataclass
class Calls:
    """What the server has seen of the stage's calls, by a hash of what each asks. answered: the start of the
    stage that was answered last, and when; in_flight, lost: calls asked again after a kill; ages_ms: how long
    before the kill that lost it an answer had been sent; kills: when each start of the stage was killed."""

    asked: set[bytes] = field(default_factory=set)
    answered: dict[bytes, tuple[int, float]] = field(default_factory=dict)
    in_flight: int = 0
    lost: int = 0
    ages_ms: list[float] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    first: float | None = None

    def ask(self, call: bytes) -> None:
        """Count a call as it comes in."""
        if self.first is None:
            self.first = time.monotonic()
        if call not in self.asked:
            self.asked.add(call)
            return
        number, answered = self.answered.get(call, (len(self.kills), 0.0))
        if number < len(self.kills) and answered <= self.kills[number]:
            self.lost += 1
            self.ages_ms.append(1e3 * (self.kills[number] - answered))
        else:  # its answer went to nobody
            self.in_flight += 1

    def answer(self, call: bytes, number: int) -> None:
        """Note that its answer has been sent to this start of the stage."""
        self.answered[call] = number, time.monotonic()

    @property
    def redone(self) -> int:
        """Calls beyond the first for each thing that is asked."""
        return self.in_flight + self.lost


def call_of(body: bytes) -> bytes:
    """What tells a call from all others."""
    return hashlib.blake2b(body, digest_size=12).digest()


def is_canary(request: Mapping[str, Any]) -> bool:
    """The stage tries a server out with greedy calls, at every start; it samples with a temperature."""
    return request["temperature"] == 0


def written(request: Mapping[str, Any], call: bytes) -> str:
    """The server's text: always the same for the same call, and different for different ones."""
    form = request.get("response_format")
    if form is None:
        return call.hex()
    schema = form["json_schema"]["schema"]
    value = smallest(schema)
    if "next_action" in value:
        actions = schema["properties"]["next_action"]["enum"]
        value |= {"title": "Look", "content": call.hex(), "next_action": actions[call[0] % len(actions)]}
    return json.dumps(value)


class Recorder(Service):
    """A service with random delays that keeps Calls."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.calls = Calls()

    def rule(self, body: bytes) -> Mapping[str, Any]:
        """How a call is treated."""
        text = written(json.loads(body), call_of(body))
        return {"do": "reply", "delay_s": self.random.uniform(*DELAY_S), "body": text}


class RecordedConnection(Connection):
    """Tells the Recorder of every call and answer. The key that comes with a call says which start of the
    stage asks: an answer may go out to one that has just been killed, or a connection outlive it."""

    service: Recorder
    number = 0

    def _call(self, authorization: str, body: bytes) -> None:
        self.number = int(authorization.removeprefix("Bearer "))
        if not is_canary(json.loads(body)):
            self.service.calls.ask(call_of(body))
        super()._call(authorization, body)

    def _answer(self, rule: Mapping[str, Any], body: bytes) -> None:
        gone = self.transport.is_closing()
        super()._answer(rule, body)
        if not gone and not is_canary(json.loads(body)):
            self.service.calls.answer(call_of(body), self.number)


@contextmanager
def served(recorder: Recorder) -> Iterator[str]:
    """A server in a thread of this process; gives its URL."""
    loop = asyncio.new_event_loop()
    making = loop.create_server(lambda: RecordedConnection(recorder), "127.0.0.1", 0, backlog=BACKLOG)
    server = loop.run_until_complete(making)
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def prepare(folder: Path, questions: int, url: str) -> None:
    """What the stage needs: data/, params.yaml, and a stand-in for the checkpoint."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data/images").mkdir(parents=True)
    for number in range(IMAGES):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"data/images/{number}.png")
    write_jsonl(
        folder / "data/records.jsonl",
        (
            Question(f"q{number:05d}", [f"images/{number % IMAGES}.png"], f"Question {number}?", "7")
            for number in range(questions)
        ),
    )
    checkpoint = folder / "artifacts/foundation/generator"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    chain = {"min_steps": MIN_STEPS, "max_steps": MAX_STEPS, "attempts": 1}
    settings = {
        "profile": "resume",
        "seed": 0,
        "generate": {"questions": questions, "samples": SAMPLES, "chain": chain},
        "engines": {"generator": {"kind": "openai", "url": url, "capacity": CAPACITY, "api_key_env": KEY}},
    }
    (folder / "params.yaml").write_text(json.dumps(settings, indent=2))


def start(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """The stage, so many kills after its first start; it ends with this process."""
    settings = {"PYTHONPATH": str(ROOT), "LONGVIEW_TRACKING": "off", KEY: str(number)}
    environment = workspace.environment(folder, settings)
    with (folder / "stage.log").open("ab") as log:
        return subprocess.Popen(
            STAGE, cwd=folder, env=environment, stdout=log, stderr=log, preexec_fn=supervise.die_with_parent
        )


def finish(stage: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for its end. Raises ResumeError if it failed."""
    if stage.wait() != 0:
        raise ResumeError(f"the stage ended with status {stage.returncode}: see {folder / 'stage.log'}")


def digests(folder: Path) -> dict[str, str]:
    """md5 of every file that the stage has published."""
    return {
        path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted((folder / OUT).iterdir())
    }


def moments(kills: int, steps: int, seed: int) -> list[float]:
    """How many steps have been answered at each kill: a random one in each of so many equal parts of the
    course; 0, which is during the start-up, for every fifth."""
    draw = random.Random(seed)
    drawn = [steps * (part + draw.random()) / kills for part in range(kills)]
    return [0.0 if number % START_UP == 0 else moment for number, moment in enumerate(drawn, start=1)]


def kill_at(moment: float, folder: Path, calls: Calls, start_up_s: float, draw: random.Random) -> None:
    """Start the stage, and kill it a random moment after so many steps have been answered; where they already
    are, during its start-up."""
    stage = start(folder, len(calls.kills))
    try:
        if len(calls.answered) >= moment:
            time.sleep(draw.uniform(0, start_up_s))
        while len(calls.answered) < moment and stage.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, JITTER_S))
        if stage.poll() is not None:
            raise ResumeError(f"the stage ended before it was killed: see {folder / 'stage.log'}")
    finally:
        calls.kills.append(time.monotonic())
        stage.kill()
        stage.wait()


@dataclass(frozen=True)
class Run:
    """The stage from its first start to its end. outputs: md5 by file; chains: finished ones, each counted
    once; start_up_s: until its first call."""

    calls: Calls
    outputs: dict[str, str]
    chains: int
    seconds: float
    start_up_s: float


def run(folder: Path, questions: int, seed: int, kills: Sequence[float] = (), start_up_s: float = 0.0) -> Run:
    """On a server of its own. kills: how many steps have been answered at each; start_up_s: how long a start
    takes."""
    recorder, draw = Recorder(seed), random.Random(seed)
    with served(recorder) as url:
        prepare(folder, questions, url)
        began = time.monotonic()
        for number, moment in enumerate(kills, start=1):
            kill_at(moment, folder, recorder.calls, start_up_s, draw)
            print(f"kill {number}: {len(recorder.calls.answered):,} steps answered", flush=True)
        finish(start(folder, len(kills)), folder)
        seconds = time.monotonic() - began
    chains = {(row["question_id"], row["sample"]) for row in read_jsonl(folder / OUT / "paths.jsonl")}
    took = (recorder.calls.first or began) - began
    return Run(recorder.calls, digests(folder), len(chains), seconds, took)


def judge(whole: Run, killed: Run, kills: int) -> tuple[list[Row], Table]:
    """Rows, and the table of what was redone."""
    calls = killed.calls
    steps = len(whole.calls.asked)
    share = 100 * calls.redone / steps
    oldest = max(calls.ages_ms, default=0.0)
    same = sum(killed.outputs.get(name) == digest for name, digest in whole.outputs.items())
    files = len(whole.outputs)
    lost = len(whole.calls.asked ^ calls.asked) + abs(whole.chains - killed.chains)
    rows = [
        Row("steps redone, in flight and answered", share, "%", f"≤ {REDONE:g}", share <= REDONE),
        Row("steps redone that were in flight when killed", 100 * calls.in_flight / steps, "%"),
        Row("steps redone that had been answered (lost by the journal)", 100 * calls.lost / steps, "%"),
        Row("age of the oldest answer lost", oldest, "ms", f"≤ {DURABLE_MS:g}", oldest <= DURABLE_MS),
        Row("files the same as without a kill", same, f"of {files}", f"= {files}", same == files),
        Row("steps or chains lost", lost, "", "= 0", lost == 0),
        Row("kills", kills, ""),
        Row("steps", steps, ""),
        Row("without a kill", whole.seconds, "s"),
        Row("killed and resumed", killed.seconds, "s"),
    ]
    each = max(kills, 1)
    cells = [
        [name, f"{count:,}", f"{count / each:.1f}", f"{100 * count / steps:.2f}"]
        for name, count in (
            ("in flight when killed", calls.in_flight),
            ("answered, not yet durable", calls.lost),
            ("together", calls.redone),
        )
    ]
    caption = (
        f"{kills} kills, {steps:,} steps of {whole.chains:,} chains, {CAPACITY} in flight, answers after "
        f"{1e3 * DELAY_S[0]:g} to {1e3 * DELAY_S[1]:g} ms, {whole.seconds:.0f} s without a kill."
    )
    return rows, Table("Steps asked again", ("", "Steps", "A kill", "% of all"), cells, caption)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=1500, help="of 4 chains, some 16 steps")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args(words)


def main() -> int:
    """Run the stage twice and compare."""
    args, folder = arguments(), HOME / "workspace"
    try:
        with workspace.alone(HOME):
            whole = run(folder, args.questions, args.seed)
            kills = moments(args.kills, len(whole.calls.asked), args.seed)
            killed = run(folder, args.questions, args.seed, kills, whole.start_up_s)
            rows, table = judge(whole, killed, args.kills)
            status = results.finish("resume", rows, [results.row_table("resume", rows), table], args.save)
            if status == 0:
                shutil.rmtree(folder)
            return status
    except (ResumeError, workspace.WorkspaceError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
