"""The flow: data to report, every stage that DVC finds stale, one at a time, under one MLflow run.

    python -m flows.retrain [--profile embedded] [--rounds 3] [--until judge] [--force]
    longview run            # the same, and it returns at once if nothing is to be done

Killed at any moment, the next run cleans up, continues and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast
from uuid import UUID

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from pydantic import Field

from flows import (
    approval,
    data,
    dvc_server,
    interruption,
    lost_runs,
    notify,
    pipeline,
    profile,
    recovery,
    run_view,
    settled,
    versions,
)
from flows.dpo_rounds import run_rounds
from flows.environment import root as find_root
from flows.environment import server_url
from flows.parent_run import parent_run, read_note, write_note
from flows.stage import DAY_S, StageFailed
from flows.walk import Walk, say
from tasks import launch
from tasks.params import ParamsError
from tasks.tracking import TrackingError

TABLE = Path("artifacts/compare/table.md")
SUPERSEDED = "Superseded"
"""Prefect's name for the end of a triggered run that newer data overtook: completed, and no notification."""
REPORT = Path("artifacts/report/report.html")


class InputsChanged(RuntimeError):
    """A stage is stale after the run: something it reads changed while the run was going."""


# Errors that say what to do; anything else is a defect and keeps its traceback.
EXPECTED = (
    StageFailed,
    InputsChanged,
    data.DataError,
    pipeline.PipelineError,
    profile.ProfileError,
    recovery.BusyError,
    interruption.Interrupted,
    ParamsError,
    TrackingError,
    versions.VersionError,
)


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    data_version: str
    ran: list[str]
    restored: list[str]
    skipped: list[str]
    pushed: int
    tag: str | None
    """Of the run as a version (flows/versions.py). None: no git repository, or `until` was given."""


@flow(name="retrain", persist_result=False)
@interruption.interruptible
def retrain(
    profile_name: str | None = None,
    rounds: Annotated[int, Field(ge=1, le=99)] | None = None,
    until: str | None = None,
    force: bool = False,
    stage_timeout_s: Annotated[float, Field(gt=0)] = DAY_S,
    data_version: Annotated[str, Field(pattern=r"^[0-9a-f]{6,32}(\.dir)?$")] | None = None,
    seed: Annotated[int, Field(ge=0)] | None = None,
) -> dict[str, Any]:
    """Bring every stage up to date with params.yaml and data.dvc.

    Args:
        profile_name: A file of profiles/, by name. None keeps the one in params.yaml.
        rounds: Number of preference rounds. None keeps it.
        until: The last stage to run: `judge`, `dpo@r2`, or `dpo` for all of them. Makes no version.
        force: Drop edits of params.yaml that another profile would overwrite.
        stage_timeout_s: Seconds that one stage may take.
        data_version: Run only if this is the data version: its md5, or six digits of it or more.
        seed: The seed in params.yaml. None keeps it.
    """
    root, began = find_root(), time.monotonic()
    queued = deployment.id is not None  # by a schedule or a trigger: waits for a run started by hand
    with chdir(root), recovery.exclusive(root, wait=queued) as cleaned, _noted(root):
        for sentence in cleaned:
            say(sentence)
        if data_version and (why := _overtaken(root, data_version)):
            return cast(Any, Completed(name=SUPERSEDED, message=why))
        asked = {**flow_run.parameters, "hardware": os.environ.get(launch.VARIABLE)}
        asked.pop("force")  # would drop edits made since
        write_note(root, asked=asked)  # for one that continues it
        prepare(root, profile_name, rounds, seed, force=force)
        version = ensure_data(str(root))
        with pipeline.opened(root):
            stages = pipeline.select(pipeline.stages(root), until)
            names = [s.name for s in stages]
            states = pipeline.states(root, names)
        with ExitStack() as stack:
            held = read_note(root)  # of a run that ended before all was pushed and published
            if any(state.state != pipeline.UP_TO_DATE for state in states.values()):
                write_note(root, unfinished="yes")
                stack.enter_context(_recorder())
                stack.enter_context(dvc_server.running(root))
            parent = stack.enter_context(parent_run(root, str(profile_of(root))))
            if held.get("unfinished") and held.get("parent_run_id"):
                parent.id()  # goes on
            walk = Walk(root, stages, states, parent, stage_timeout_s)
            walk_all(walk)
            executed = len(walk.did("skipped")) < len(stages)
            with pipeline.opened(root):
                check_nothing_stale(str(root), names)
                recovery.keep_lock_file(root)
                left = until is None and not carried_out(root)
                pushed = push(str(root)) if executed or held.get("unfinished") or left else 0
            if until is None:  # half a pipeline is no version, and only what a version holds becomes champion
                facts = versions.Facts(
                    version, profile_of(root), parent.opened, str(flow_run.id), tuple(walk.did("ran"))
                )
                tag, state = carry_out(root, facts, promotes="promote" in names)
            else:
                tag, state = None, _left(root, names)
            publish(root, parent.opened)
            write_note(root, unfinished=None, asked=None)
        done = Summary(version, walk.did("ran"), walk.did("restored"), walk.did("skipped"), pushed, tag)
        if executed:
            notify.finished(root, done, time.monotonic() - began, state)
        return asdict(done)


def carry_out(root: Path, facts: versions.Facts, *, promotes: bool) -> tuple[str | None, str | None]:
    """What follows the push: the run's version, the decision, MLflow's page. Its tag, and what became of the
    candidate."""
    made = record(str(root), facts)
    state = approval.settle(root, made) if promotes else None
    run_view.publish(root, facts.mlflow_run, facts, made)
    return (made.tag if made else None), state


def _left(root: Path, names: list[str]) -> str | None:
    """ "left" if the run ends with a decision that it does not carry out."""
    if "promote" not in names or settled.is_settled(root):
        return None
    say(settled.LEFT)
    return "left"


def _overtaken(root: Path, data_version: str) -> str | None:
    """Why a triggered run has nothing to do: newer data has a run of its own. None: it is the data version.

    Raises DataError where a person asked for another one.
    """
    try:
        data.require(root, data_version)
        return None
    except data.DataError as error:
        if not _triggered():
            raise
        say(str(error))
        return f"data version {data_version} was overtaken: data.dvc names {data.version(root)}"


def _triggered() -> bool:
    """Whether new data started this run, not a person: overtaken by newer data, it has nothing to do."""
    context = FlowRunContext.get()
    maker = context.flow_run.created_by if context and context.flow_run else None
    return maker is not None and maker.type == "AUTOMATION"


def prepare(
    root: Path, name: str | None, rounds: int | None, seed: int | None = None, *, force: bool = False
) -> None:
    """params.yaml as asked, and nothing left from rounds that it no longer has."""
    changed = profile.activate(root, name, rounds, force=force)
    changed += profile.set_seed(root, seed) if seed is not None else []
    for line in changed:
        say(f"params.yaml: {line}")
    for line in profile.drop_old_rounds(root):
        say(line)


def profile_of(root: Path) -> str:
    """The name of the active profile."""
    from tasks.params import read

    return str(read(root / "params.yaml").get("profile", profile.DEFAULT))


def walk_all(walk: Walk) -> None:
    """Stages that the rounds need, the rounds, then the stages that need them."""
    first_round = {s.name for s in walk.stages if s.round}
    before = [s for s in walk.stages if not s.round and not s.ancestors & first_round]
    after = [s for s in walk.stages if not s.round and s.ancestors & first_round]
    for stage in before:
        walk.visit(stage)
    run_rounds(walk)
    for stage in after:
        walk.visit(stage)


@task(cache_policy=NO_CACHE, persist_result=False)
def ensure_data(root: str) -> str:
    """data/ as data.dvc says."""
    return data.ensure(Path(root), say)


@task(cache_policy=NO_CACHE, persist_result=False)
def check_nothing_stale(root: str, names: list[str]) -> None:
    """`--single-item` does not look upstream, so look once at the end."""
    stale = pipeline.pending(Path(root), names)
    if stale:
        raise InputsChanged(
            f"{', '.join(stale)}: stale after the run, so code, params.yaml or data/ changed meanwhile. "
            "Run again: only what the change touches will run."
        )


def carried_out(root: Path) -> bool:
    """Whether what is here is a version, and its decision in the registry: then the remote has its files.

    It need not be so because no stage ran now: `dvc repro` runs them by hand.
    """
    return not versions.is_new(root) and settled.is_settled(root)


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=10)
def push(root: str) -> int:
    """`dvc push`: every version that this run made, to the default remote."""
    return pipeline.push(Path(root))


@task(cache_policy=NO_CACHE, persist_result=False)
def record(root: str, facts: versions.Facts) -> versions.RunVersion | None:
    """The run as a git commit and tag, once its files are in the remote."""
    made = versions.record(Path(root), facts)
    say(f"version: {made.tag}" if made else "no git repository: the run has no version")
    return made


def publish(root: Path, run_id: str | None) -> None:
    """The result table and where the report is, as Prefect artifacts."""
    if run_id is None or not (root / TABLE).is_file():
        return
    create_markdown_artifact((root / TABLE).read_text(encoding="utf-8"), key="comparison")
    mlflow = server_url("mlflow", root)
    link = f"{mlflow}/#/experiments/runs/{run_id}" if mlflow else (root / REPORT).as_uri()
    create_link_artifact(link, "MLflow run" if mlflow else "report", key="report")


@contextmanager
def _recorder() -> Iterator[None]:
    from tasks.tracking import shared_recorder

    with shared_recorder():
        yield


@contextmanager
def _noted(root: Path) -> Iterator[None]:
    """Mark the Prefect run of a killed run as crashed, and leave our own id for the next."""
    dead = read_note(root).get("flow_run_id")
    if dead:
        from prefect.client.orchestration import get_client

        with (
            suppress(Exception),
            get_client(sync_client=True) as client,
        ):  # another server may be in use by now
            lost_runs.crash(client, UUID(dead), "killed; continued by a later run")
    write_note(root, flow_run_id=flow_run.id)
    try:
        yield
    finally:  # only a kill leaves the note: a run that failed has said so itself
        write_note(root, flow_run_id=None)


def main() -> None:
    """Run the flow from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--until")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    try:
        with recovery.marked(find_root()):
            summary = retrain(args.profile, args.rounds, args.until, args.force)
    except EXPECTED as error:
        sys.exit(f"\n{error}")
    except Exception as error:
        if sentence := interruption.reason(error):
            sys.exit(f"\n{sentence}")
        raise
    print(
        f"ran {len(summary['ran'])}, restored {len(summary['restored'])}, skipped {len(summary['skipped'])}"
    )


if __name__ == "__main__":
    main()
