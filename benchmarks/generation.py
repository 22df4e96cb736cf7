"""Sampling with vLLM: step chains beside the same calls one at a time, and beside all of them known up front.

    python -m benchmarks.generation [--save]
    python -m benchmarks.generation --runs 1 --questions 16        # a quick one
    python -m benchmarks.generation --from-artifacts .             # the chains and generator of a checkout

Four clients of one model with the same engine arguments play the same finished trace (benchmarks/traces.py):
the same prompts with their images, the same texts, constrained by the same schemas. The model computes every
token; a logits processor then leaves only the trace's to be drawn (benchmarks/peers/trace_replay.py), so that
chains go on with what was written, as in life, and find it in the cache.

- one at a time: vLLM's own `LLM.chat`, a call when the one before has come back, as the published generator
  works. It asks the calls of the first questions only: its rate does not depend on how many there are.
- the bound: vLLM's own `LLM.chat` with every call of the trace at once. No chain can be sampled like that:
  a step's prompt holds the steps before it. It keeps the engine full from the first call to the last, but
  computes prompts whose beginning is still being written beside them, which chains find in the cache.
- Longview, `kind: vllm` and `kind: openai` with `launch`: as a stage samples, with the journal on, every
  chain asking for a step when it has the one before.

The prefix cache is on for all. Runs take turns; in every run each board has one pixel of its own, so that
nothing is left of earlier runs in any cache.

vLLM is that of --python, or of $VLLM_PYTHON, or its CPU build, which is installed (`make vllm`). All clients'
engines are loaded at once, so each gets a share of the memory only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson

from benchmarks import results
from benchmarks.results import ROOT, Row, Table
from benchmarks.traces import SETTINGS, Trace, calls, drawn, numbered, recorded, write_script
from models.engines.base import Engine, EngineError, Request
from models.engines.journalled import JournalledEngine
from models.engines.openai import ClientSettings, OpenAIEngine, chat
from models.engines.process import OwnProcess
from models.engines.server import Server, ServerSettings, vllm_command
from models.engines.vllm import VLLMEngine, WorkerSettings, worker_command
from models.engines.watched import WatchedEngine
from models.journal import Journal
from models.reasoning import progressive_chain, step_json
from models.records import Step
from tasks import roles
from tasks.sampling import sample_chains

RATIO, SHARE = 10.0, 0.85
"""Targets: calls a second as a multiple of those one at a time; as a share of the bound's."""
ONE, BOUND, OURS, SERVED = "one at a time", "bound", "longview, vllm", "longview, openai"
SAMPLES = 4
CAPACITY = 128
"""Of our clients, twice --max-num-seqs: the next requests wait in the engine."""
WORK = ROOT / ".work"
PEERS = ROOT / "benchmarks" / "peers"
WARM_UP = 8
"""Questions."""
PROFILE = ROOT / "profiles" / "embedded.yaml"
COMMON = [
    *("--max-model-len", "1024", "--max-num-seqs", "64", "--limit-mm-per-prompt", '{"image": 1}'),
    *("--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "xgrammar"}'),
    *("--logits-processors", "trace_replay:TraceReplay"),
]
ON_CPU = [
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--gpu-memory-utilization", "0.1"),
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
]
ON_GPU = ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.25"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""For the CPU build."""


@dataclass(frozen=True)
class Run:
    """One client, once through the trace (or its begin)."""

    seconds: float
    calls: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds


@dataclass(frozen=True)
class Work:
    """What every client is given to do. model: a checkpoint's folder; first: calls that are made one at a
    time; folder: scratch, where the boards and the model's script are."""

    trace: Trace
    model: Path
    first: int
    folder: Path

    @property
    def boards(self) -> Path:
        return self.folder / "boards"

    @property
    def script(self) -> Path:
        return self.folder / "script.json"

    def numbered(self, number: int) -> Trace:
        """The trace with boards of its own."""
        return numbered(self.trace, number, self.boards)

    def begin(self, questions: int) -> Work:
        """The chains of the first questions alone."""
        chains = self.trace.chains[: questions * self.trace.samples]
        return replace(self, trace=replace(self.trace, chains=chains))


@dataclass(frozen=True)
class Vllm:
    """The interpreter that has vLLM, and what its engines are started with."""

    python: str
    arguments: list[str]
    environment: dict[str, str]


class Peer:
    """vLLM's own `LLM` in a process of its own (benchmarks/peers/vllm_peer.py)."""

    def __init__(self, vllm: Vllm, work: Work) -> None:
        self._process = OwnProcess("vLLM's LLM", work.folder / "peer.log")
        command = [vllm.python, str(PEERS / "vllm_peer.py"), "--model", str(work.model), *vllm.arguments]
        self._process.start(command, vllm.environment, piped=True)

    def __enter__(self) -> Peer:
        self._said()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def one_at_a_time(self, work: Work, number: int) -> Run:
        """The first calls, each when the one before has come back."""
        return self._run("one", calls(work.numbered(number))[: work.first], work)

    def all_at_once(self, work: Work, number: int) -> Run:
        """Every call."""
        return self._run("all", calls(work.numbered(number)), work)

    def _run(self, how: Literal["one", "all"], asked: Sequence[Request], work: Work) -> Run:
        file = work.folder / "calls.jsonl"
        file.write_bytes(b"".join(told(call, work.boards) for call in asked))
        watcher = self._process.watcher
        assert watcher is not None and watcher.stdin is not None
        watcher.stdin.write(orjson.dumps({"calls": str(file), "how": how}, option=orjson.OPT_APPEND_NEWLINE))
        watcher.stdin.flush()
        return Run(**self._said())

    def _said(self) -> dict[str, Any]:
        watcher = self._process.watcher
        assert watcher is not None and watcher.stdout is not None
        if not (line := watcher.stdout.readline()):
            watcher.wait()
            self._process.check()
        said: dict[str, Any] = orjson.loads(line)
        return said


def told(call: Request, boards: Path) -> bytes:
    """A call as the peer reads it."""
    line = {
        "messages": chat(call.prompt, []),
        "images": [str(boards / name) for name in call.prompt.images],
        "schema": call.schema,
        "max_tokens": call.sampling.max_new_tokens,
        "temperature": call.sampling.temperature,
        "top_p": call.sampling.top_p,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def sample(engine: Engine, work: Work, number: int) -> Run:
    """Every chain of the trace as a stage samples them, its journal included. Raises EngineError if other
    chains came."""
    trace = work.numbered(number)
    watched = WatchedEngine(engine)
    with tempfile.TemporaryDirectory(dir=work.folder) as scratch:
        began = time.perf_counter()
        with Journal(Path(scratch) / "generator.journal") as journal:
            rows: list[Any] = []
            sample_chains(
                JournalledEngine(watched, journal),
                trace.questions,
                trace.samples,
                lambda engine, question, sample: progressive_chain(engine, question, sample, SETTINGS, 0),
                [],
                1,
                Path(scratch),
                rows.append,
            )
        seconds = time.perf_counter() - began
    if not same_chains(rows, trace):
        raise EngineError(f"the engine did not write the trace's chains, but {rows[0]}, …")
    done = watched.throughput
    return Run(seconds, done.answered, done.output_tokens, done.prompt_tokens, done.cached_tokens)


def same_chains(rows: Sequence[Mapping[str, Any]], trace: Trace) -> bool:
    """Whether these are the trace's chains. Those of questions with the same words may change places."""
    words = {question.id: question.question for question in trace.questions}
    found = Counter(
        (words[row["question_id"]], *(step_json(Step(**step)) for step in row["steps"]), row["answer"])
        for row in rows
        if "reason" not in row
    )
    return found == Counter(chain.said for chain in trace.chains)


@contextmanager
def clients(vllm: Vllm, work: Work) -> Iterator[dict[str, Callable[[Work, int], Run]]]:
    """What runs each client once through a trace, by its name; all engines are loaded."""
    replayed = {"TRACE_REPLAY": str(work.script), "PYTHONPATH": str(PEERS)}
    vllm = replace(vllm, environment={**vllm.environment, **replayed})
    settings = ClientSettings(seeded=False)
    worker = WorkerSettings(
        work.folder / "vllm.log", worker_command(vllm.python), vllm.arguments, vllm.environment, seeded=False
    )
    server = ServerSettings(
        str(work.model),
        work.folder / "server.log",
        command=vllm_command(vllm.python),
        arguments=[*vllm.arguments, "--disable-log-stats"],
        environment=vllm.environment,
    )
    with ExitStack() as opened:
        peer = opened.enter_context(Peer(vllm, work))
        ours = opened.enter_context(VLLMEngine(str(work.model), work.boards, CAPACITY, worker))
        served = opened.enter_context(Server(server))
        client = OpenAIEngine(served.url, str(work.model), work.boards, CAPACITY, settings)
        yield {
            ONE: peer.one_at_a_time,
            BOUND: peer.all_at_once,
            OURS: partial(sample, ours),
            SERVED: partial(sample, client),
        }


def measure(run: Mapping[str, Callable[[Work, int], Run]], work: Work, runs: int) -> dict[str, list[Run]]:
    """Runs by client, taking turns after a short one of each."""
    found: dict[str, list[Run]] = {name: [] for name in run}
    number = itertools.count()
    for once in run.values():
        once(work.begin(WARM_UP), next(number))
    for _ in range(runs):
        for name, once in run.items():
            one = once(work, next(number))
            print(f"{name}: {one.rate:.1f} calls/s", flush=True)
            found[name].append(one)
    return found


def judge(found: Mapping[str, Sequence[Run]]) -> tuple[list[Row], Table]:
    """Rows, and the table. Ratios are medians over the rounds, each of two runs that followed each other."""
    rows, cells = [], []
    for name, runs in found.items():
        rate, low, high = spread([run.rate for run in runs])
        rows.append(Row(f"{name} ({low:.1f} to {high:.1f})", rate, "calls/s"))
        tokens = statistics.median(run.tokens / run.seconds for run in runs)
        cached = sum(run.cached_tokens for run in runs) / sum(run.prompt_tokens for run in runs)
        ratios = []
        for other, target in ((ONE, RATIO), (BOUND, SHARE)):
            ratio, least, most = spread([a.rate / b.rate for a, b in zip(runs, found[other], strict=True)])
            ratios.append(f"{ratio:.2f} ({least:.2f} to {most:.2f})")
            if name in (OURS, SERVED):
                what = f"{name} / {other}, calls a second (median of {len(runs)}, {least:.2f} to {most:.2f})"
                rows.append(Row(what, ratio, "×", f"≥ {target:g}", ratio >= target))
        cells.append([name, f"{rate:.1f}", f"{tokens:,.0f}", f"{cached:.0%}", *ratios])
    calls, tokens = found[BOUND][0].calls, found[BOUND][0].tokens
    head = ("Client", "Calls/s", "Output tokens/s", "Cached", "Times one at a time", "Of the bound")
    caption = (
        f"{calls:,} calls of {tokens / calls:.1f} tokens; one at a time: the first {found[ONE][0].calls} of "
        f"them. Medians of {len(found[BOUND])} runs; in brackets the least and the most."
    )
    return rows, Table("Sampling with vLLM", head, cells, caption)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


def prepare(trace: Trace, checkpoint: Path | None, first: int, folder: Path) -> Work:
    """The work with its model: that of a checkpoint, or a random one of the embedded profile's sizes."""
    from transformers import AutoProcessor

    work = Work(trace, checkpoint or folder / "model", first, folder)
    if checkpoint is None:
        make_model(trace, work.model)
    processor = AutoProcessor.from_pretrained(work.model)
    write_script(work.numbered(0), processor, work.boards, work.script)
    return work


def make_model(trace: Trace, folder: Path) -> None:
    """Random weights, and a tokenizer of the trace's words."""
    import torch

    from models.tiny import build_model, build_processor, train_tokenizer
    from models.vlm import save
    from tasks import foundation, params

    sizes = params.load("foundation", foundation.Params, PROFILE).sizes
    tokenizer = train_tokenizer(
        [*trace.texts.values(), *(q.question for q in trace.questions)], sizes.vocabulary
    )
    torch.manual_seed(0)
    save(build_model(sizes, tokenizer), build_processor(tokenizer, sizes), folder)


def find_vllm(python: str | None) -> Vllm:
    """The interpreter named, or that of $VLLM_PYTHON, or of the environment that `make vllm` makes."""
    named = python or os.environ.get("VLLM_PYTHON")
    if not named:
        subprocess.run(["make", "--silent", "vllm"], cwd=ROOT, check=True, stdout=sys.stderr)
        named = str(ROOT / ".venv-vllm" / "bin" / "python")
    on_gpu = shutil.which("nvidia-smi") is not None
    return Vllm(named, [*COMMON, *(ON_GPU if on_gpu else ON_CPU)], {} if on_gpu else ENVIRONMENT)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each client")
    parser.add_argument("--questions", type=int, default=128, help="of 4 chains")
    parser.add_argument("--one-at-a-time", type=int, default=40, metavar="CALLS", help="of each run")
    parser.add_argument(
        "--from-artifacts", type=Path, metavar="DIR", help="a checkout: its generator and chains"
    )
    parser.add_argument("--python", metavar="VLLM_PYTHON", help="interpreter of an environment that has vLLM")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args(words)


def main() -> int:
    """Run every client and compare."""
    args = arguments()
    vllm = find_vllm(args.python)
    checkpoint = None
    if args.from_artifacts:
        trace = recorded(args.from_artifacts.resolve(), args.questions)
        checkpoint = args.from_artifacts.resolve() / roles.GENERATOR
    else:
        trace = drawn(args.questions, SAMPLES)
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK, prefix="generation-") as folder:
        work = prepare(trace, checkpoint, args.one_at_a_time, Path(folder))
        with clients(vllm, work) as runs:
            found = measure(runs, work, args.runs)
    rows, table = judge(found)
    name = "generation-embedded" if checkpoint else "generation"
    return results.finish(name, rows, [results.row_table(name, rows), table], args.save)


if __name__ == "__main__":
    sys.exit(main())
