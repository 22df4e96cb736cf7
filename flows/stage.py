"""The one Prefect task that runs a stage: `dvc repro --single-item`, supervised, logged, retried if sensible.

python -m flows.retrain        # walks every stage with it
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.states import Completed

from flows import devices, dvc_server, published, recovery, terminal
from flows.environment import fresh_log, stage_environment

DAY_S = 24 * 3600
RETRIES = 3

# Failures that another attempt may cure. Everything else fails at once: a wrong parameter stays wrong.
TRANSIENT = re.compile(
    r"Unable to acquire lock|is busy, it is being blocked by|database is locked"
    r"|Connection reset by peer|Temporary failure in name resolution|Read timed out"
    r"|429 Client Error|50[234] Server Error"
    r"|the MLflow recorder (is gone|ended)"
)

ADVICE = [
    (
        r"No space left on device",
        "the disk is full: free space (`dvc gc -w` drops old versions), then run again",
    ),
    (r"CUDA out of memory", "the GPU is full: lower the batch size in section '{section}' of params.yaml"),
    (
        r"Diverged: ",
        "what was trained before is kept: change section '{section}' of params.yaml as the message advises, "
        "then run again",
    ),
    (r"ModuleNotFoundError", "a package is missing: `make install`, then `longview doctor`"),
    (r"ParamsError", "correct params.yaml, then run again"),
    (r"TrackingError", "MLflow is the cause: `longview doctor` says what to do"),
]
RAISED = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z]\w*[a-z]\w*: (.+)", re.MULTILINE)
"""The last line of a traceback: the error's name and what it says, which is what fits on a phone."""
KILLED = (
    "it was killed, most often for want of memory: lower the batch size in section '{section}' of params.yaml"
)
DEFAULT_ADVICE = (
    "correct the cause and run again: finished stages are kept, and this one continues where it stopped"
)


class StageFailed(RuntimeError):
    """A stage ended badly. The message names the stage, the end of its log and what to do."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    stage: str
    did: Literal["ran", "restored", "skipped"]
    seconds: float = 0.0


def _is_transient(task: Any, run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.transient


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,  # DVC decides what is up to date
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=[2, 10, 30],
    retry_condition_fn=_is_transient,
)
def run_stage(
    stage: str, reason: str | None, root: str, parent_run_id: str | None = None, timeout_s: float = DAY_S
) -> State[Any] | Outcome:
    """Run `stage` because of `reason`; without a reason it is up to date, and only shown as skipped."""
    if reason is None:
        return Completed(name="Skipped", message="up to date")
    return execute(stage, Path(root), parent_run_id, timeout_s)


def execute(stage: str, root: Path, parent_run_id: str | None, timeout_s: float = DAY_S) -> Outcome:
    """Run the stage in a subprocess and say how it went. Raises StageFailed."""
    began = time.monotonic()
    if published.record(root, stage):
        return Outcome(stage, "restored", time.monotonic() - began)
    log = fresh_log(stage, root)
    environment = stage_environment(root)
    environment.pop("LONGVIEW_PARENT_RUN_ID", None)
    if parent_run_id:
        environment["LONGVIEW_PARENT_RUN_ID"] = parent_run_id
    try:
        with devices.held(stage, root):
            repro = dvc_server.repro(stage, root, environment)
            status = terminal.run(repro, log=log, timeout_s=timeout_s)
    except terminal.TimedOut as error:
        raise StageFailed(_message(stage, root, log, str(error))) from None
    seconds = time.monotonic() - began
    if status != 0:
        recovery.end_orphans(root, stage)  # only if the supervisor itself was killed
        text = log.read_text(encoding="utf-8", errors="replace")
        problem = f"ended with status {status} after {seconds:.0f} s"
        raise StageFailed(_message(stage, root, log, problem, status), transient=bool(TRANSIENT.search(text)))
    published.forget(root, stage)
    restored = "is cached - skipping run" in log.read_text(encoding="utf-8", errors="replace")
    return Outcome(stage, "restored" if restored else "ran", seconds)


def _message(stage: str, root: Path, log: Path, problem: str, status: int = 0) -> str:
    end = terminal.tail(log)
    quoted = "\n".join(f"    | {line}" for line in end.splitlines())
    raised = RAISED.findall(end)
    return (
        f"stage '{stage}': {problem}{f': {raised[-1]}' if raised else ''}\n{quoted}\n"
        f"  whole log:  {log.relative_to(root)}\n"
        f"  what to do: {_advice(stage, end, status)}\n"
        f"  by itself:  dvc repro --single-item {stage}"
    )


def _advice(stage: str, text: str, status: int) -> str:
    section = stage.partition("@")[0].replace("evaluate_round", "evaluate")
    killed = status in (137, 247) or re.search(r"exited with -9|signal 9|\bKilled\b", text)
    found = next((words for pattern, words in ADVICE if re.search(pattern, text)), None)
    return (found or (KILLED if killed else DEFAULT_ADVICE)).format(section=section)
