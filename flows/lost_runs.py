"""Runs that Prefect shows as going on, though their process is gone: nobody was there to say so.

    longview worker        # looks for them as long as it lives

A worker reports the end of a process that it started itself. After it was killed, nobody does, even if it was
started again: the run would stay *Running*, or *Pending* if it had only been taken, and hold its place in the
queue until Prefect's lease ends, five minutes. And runs that a worker took just when the server went away:
Prefect gives up on them, and a nightly run would not take place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flows import engine
from flows.registration import POOL

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ENGINES = {"flows.engine", "prefect.engine"}
GOING = {"any_": ["PENDING", "RUNNING", "CANCELLING"]}
LOST = "its process died and no worker saw it; the next run continues it"
NOT_STARTED = re.compile(
    r"Failed to submit flow run to infrastructure: (Connect|Read|Write|Pool|RemoteProtocol)\w*:"
)
"""Prefect's message of a run whose process a worker did not start, for it did not reach the server."""
STILL_DUE = timedelta(hours=1)
LOOK_S = 20.0
"""Seconds between two looks. A worker that lives starts the process of a run that it has taken well before,
and reports its end well before."""


def watch(worker: str, say: Callable[[str], None]) -> None:
    """Set the runs to *Crashed* that two looks in a row found lost, and start others again; for ever.

    Args:
        worker: The name of this machine's worker.
        say: Told which, and once when Prefect does not answer.
    """
    before: set[UUID | None] = set()
    quiet = False
    while True:
        try:
            before, quiet = close(worker, say, before), False
        except Exception as error:  # the worker goes on, whatever became of this look
            if not quiet:
                say(f"cannot look for lost runs, trying again: {type(error).__name__}: {error}")
            quiet = True
        time.sleep(LOOK_S)


def close(worker: str, say: Callable[[str], None], before: set[UUID | None]) -> set[UUID | None]:
    """Close the lost runs that were lost `before`; the states of those that are lost now, by id.

    Nothing is done while a worker of another name serves the pool: the processes may be on its machine.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    with get_client(sync_client=True) as client:
        for run in not_started(client):
            client.set_flow_run_state(run.id, Scheduled(message="the server was away"), force=True)
            say(f"run {run.name}: due again; the server was away when it was to start")
        found = [] if others(client, worker) else lost(client)
        for run in found:
            if run.state_id in before:
                crash(client, run.id, LOST)
                say(f"run {run.name}: Crashed; {LOST}")
    return {run.state_id for run in found}


def crash(client: SyncPrefectClient, run: UUID, message: str) -> None:
    """*Crashed*: this run, and what goes on under it (its rounds)."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Crashed

    under = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run]}, "state": {"type": GOING}})
    for one in [run, *(child.id for child in client.read_flow_runs(flow_run_filter=under))]:
        client.set_flow_run_state(one, Crashed(message=message), force=True)


def not_started(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs of the pool that were due within the hour and *Crashed* before anything of them ran."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

    lately = datetime.now(UTC) - STILL_DUE
    crashed = FlowRunFilter.model_validate(
        {"state": {"type": {"any_": ["CRASHED"]}}, "expected_start_time": {"after_": lately}}
    )
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    found = client.read_flow_runs(flow_run_filter=crashed, work_pool_filter=pool)
    return [run for run in found if run.state and NOT_STARTED.match(run.state.message or "")]


def others(client: SyncPrefectClient, worker: str) -> list[str]:
    """Workers that serve the pool, by Prefect's heartbeat, beside the one of this name."""
    from prefect.exceptions import ObjectNotFound

    with suppress(ObjectNotFound):
        found = client.read_workers_for_work_pool(POOL)
        return [one.name for one in found if one.status == "ONLINE" and one.name != worker]
    return []


def lost(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs of the pool that are taken or going on, and have no process here."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

    going = FlowRunFilter.model_validate({"state": {"type": GOING}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    found = client.read_flow_runs(flow_run_filter=going, work_pool_filter=pool)
    alive = set(running())
    return [run for run in found if str(run.id) not in alive]


def running() -> Iterable[str]:
    """The runs whose own process, not only one of their stages, lives on this machine."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if ENGINES & set(process.cmdline()) and (run := process.environ().get(engine.RUN)):
                yield run
