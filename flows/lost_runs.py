"""Runs that Prefect shows as going on, though their process is gone: their worker died before it said so.

    longview worker        # looks for them before it starts

A worker reports a run whose process ends. When both are killed, nobody does: the run would stay *Running*, or
*Pending* if it had only been taken, and hold its place in the queue until Prefect's lease ends, five minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from flows.registration import POOL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

MARK = "PREFECT__FLOW_RUN_ID"
"""Prefect's variable in the environment of a run's process."""
STARTING_S = 30.0
"""A worker of this machine that lives has started the process of a run that it has taken by then."""


def close(worker: str, say: Callable[[str], None]) -> list[str]:
    """Set lost runs of this machine to *Crashed*; their names.

    Nothing is done while a worker of another name serves the pool: the processes may be on its machine.

    Args:
        worker: The name of this machine's worker.
        say: Told before a wait.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        if others(client, worker) or not lost(client):
            return []
        youngest = min(age_s(run) for run in lost(client))
        if youngest < STARTING_S:
            say(f"a run was taken {youngest:.0f} s ago and has no process: waiting, in case it still starts")
            time.sleep(STARTING_S - youngest)
        closed = lost(client)
        message = "its process and its worker died; the next run continues it"
        for run in closed:
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return [run.name for run in closed]


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

    going = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    found = client.read_flow_runs(flow_run_filter=going, work_pool_filter=pool)
    alive = set(running())
    return [run for run in found if str(run.id) not in alive]


def running() -> Iterable[str]:
    """The runs whose own process, not only one of their stages, lives on this machine."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if "prefect.engine" in process.cmdline() and (mark := process.environ().get(MARK)):
                yield mark


def age_s(run: FlowRun) -> float:
    """Seconds since the run came into its state; a run that goes on had a process, so it does not wait."""
    if run.state is None or run.state.is_running():
        return STARTING_S
    return time.time() - run.state.timestamp.timestamp()
