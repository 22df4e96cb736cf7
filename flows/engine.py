"""The process of a run that a worker starts: Prefect's engine, as soon as Prefect's server answers.

    python -m flows.engine        # the command in prefect.yaml; a worker sets PREFECT__FLOW_RUN_ID

Prefect's own ends at once, and cannot say why, if the server restarts at that moment. And a process whose
output goes through its worker ends at its next line when the worker is killed: this one writes to
.work/logs/runs/FLOW.log, and outlives it.
"""

from __future__ import annotations

import os
import runpy
import sys
import time

from flows.environment import fresh_log

RUN = "PREFECT__FLOW_RUN_ID"
"""Prefect's variable: which run this process is."""
UNTIL = "LONGVIEW_ENGINE_UNTIL"
"""Seconds since 1970 until which the server is waited for; set when the process starts itself again."""
AWAY_S, LOOK_S = 480.0, 1.0


def main() -> None:
    """Wait, write to the log, be the engine; begin again if it failed because the server went away."""
    again = UNTIL in os.environ
    until = float(os.environ.setdefault(UNTIL, str(time.time() + AWAY_S)))
    name = flow_name()
    while name is None and time.time() < until:
        time.sleep(LOOK_S)
        name = flow_name()
    if not again:
        log = os.open(fresh_log(f"runs/{name or 'unknown'}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    try:
        runpy.run_module("prefect.engine", run_name="__main__")
    except SystemExit as ended:
        if not ended.code or flow_name() or time.time() > until:
            raise
        print("Prefect's server went away: starting again", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "flows.engine"])


def flow_name() -> str | None:
    """The flow of this process's run; None if the server does not answer, or a proxy says so in its place."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            run = client.read_flow_run(os.environ[RUN])  # type: ignore[arg-type]
            return client.read_flow(run.flow_id).name
    except httpx.TransportError:
        return None
    except httpx.HTTPStatusError as error:
        if error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
            raise
        return None


if __name__ == "__main__":
    main()
