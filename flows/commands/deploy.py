"""`longview deploy` and `longview worker`: scheduled and triggered runs on a Prefect server.

longview deploy --cron "0 3 * * *"
longview worker
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer


class Infrastructure(StrEnum):
    """Where runs of a deployment take place."""

    process = "process"
    docker = "docker"
    kubernetes = "kubernetes"


Cron = Annotated[str | None, typer.Option("--cron", help="When `retrain` starts; `off`: never by itself.")]
Timezone = Annotated[
    str | None, typer.Option("--timezone", help="Of --cron, as `Europe/Zurich`; UTC if left out.")
]
Watch = Annotated[int | None, typer.Option("--watch", min=10, help="Seconds between two looks for new data.")]
Drop = Annotated[
    str | None,
    typer.Option("--drop", help="Folder in which new data is dropped, a folder each; `off`: none."),
]
Notify = Annotated[
    str | None,
    typer.Option("--notify", help="Webhook or Apprise URL to send summaries and failures to; `off`."),
]
On = Annotated[
    Infrastructure | None, typer.Option("--on", help="What a run is started as, at first a process.")
]
Image = Annotated[
    str | None, typer.Option("--image", help="Container image, with --on docker or kubernetes.")
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, help="GPU slots; as many as this machine has if left out.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Take the deployments over from another checkout on this server.")
]


def deploy(
    cron: Cron = None,
    timezone: Timezone = None,
    watch: Watch = None,
    drop: Drop = None,
    notify: Notify = None,
    on: On = None,
    image: Image = None,
    gpus: Gpus = None,
    force: Force = False,
) -> None:
    """Register this checkout with the Prefect server: deployments, schedules, triggers, notifications.

    An option left out keeps what is registered. Running it again changes nothing. Refused where the server
    has the deployments of another checkout: runs that they start would take place here from then on.

    Examples:

        longview deploy

        longview deploy --cron "0 3 * * *" --timezone Europe/Zurich

        longview deploy --drop ~/inbox --notify ntfy://ntfy.sh/my-topic

        longview deploy --on kubernetes --image registry.example.com/longview:1

        longview deploy --force            # the checkout was moved, or this one takes over
    """
    from pathlib import Path

    from flows import deploy as deployments
    from flows.environment import root
    from flows.registration import OFF, DeployError, Options

    if drop and drop != OFF:
        folder = Path(drop).expanduser().resolve()  # inside the checkout containers see it, too
        drop = str(folder.relative_to(root()) if folder.is_relative_to(root()) else folder)
    options = Options(cron, timezone, watch, drop, notify, on and on.value, image, gpus, force)
    try:
        typer.echo(f"Prefect: {deployments.server().removesuffix('/api')}")
        report = deployments.deploy(root(), options)
    except DeployError as error:
        _stop(error)
    for name, did in report.lines:
        typer.echo(f"{name:36} {did}")
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo("next: `longview worker` in a terminal of its own, or as a service; it runs what is due")


def worker(
    name: Annotated[
        str | None, typer.Option("--name", help="The worker's name in Prefect; this machine's if left out.")
    ] = None,
) -> None:
    """Start a worker: until it is stopped, it runs here what is scheduled, triggered or asked for.

    A run outlives its worker: its log is in Prefect and in .work/logs/runs. A run whose process died while no
    worker looked on is closed, so that it does not hold up the queue.

    Example:

        longview worker
    """
    from flows import deploy as deployments
    from flows import lost_runs
    from flows.environment import root
    from flows.registration import POOL, DeployError

    called = name or socket.gethostname()
    try:
        deployments.server()
    except DeployError as error:
        _stop(error)
    os.chdir(root())
    binaries = str(Path(sys.executable).parent)  # its runs are started by name
    os.environ["PATH"] = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    threading.Thread(target=lost_runs.watch, args=(called, typer.echo), daemon=True).start()
    sys.argv = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", called]
    runpy.run_module("prefect", run_name="__main__")


def _stop(error: Exception) -> NoReturn:
    typer.echo(f"\n{error}", err=True)
    raise typer.Exit(1) from None
