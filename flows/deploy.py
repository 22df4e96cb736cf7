"""Register this checkout with a Prefect server: work pool, GPU slots, deployments, triggers, notifications.

    longview deploy --cron "0 3 * * *" --drop inbox --notify https://hooks.slack.com/services/…
    longview worker

The deployments stand in prefect.yaml, which `prefect deploy --all` reads, too. Registering again changes only
what differs: runs that are scheduled or queued stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import automations, devices
from flows.registration import (
    OFF,
    DeployError,
    Options,
    Report,
    pool_of,
    refuse_taken,
    register,
    schedule_of,
    specification,
)

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

FILE = "prefect.yaml"
POOL_RUNS = 4
"""Runs of one pool at a time: one of each deployment."""
FORGETS = """this server keeps reservations in memory: when it restarts during a run, a GPU slot or the place
in the queue may stay taken for ever. Start the server with
  PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem
(docs/operating.md, "Schedule and trigger", says how to free a slot)"""
TEMPLATES = {kind: f"deploy/{kind}.json" for kind in ("docker", "kubernetes")}


def server() -> str:
    """The address of the Prefect server to register with. Raises DeployError if none answers."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        raise DeployError(
            "no Prefect server: a deployment needs one that stays.\n"
            "  here:       longview up, then longview deploy\n"
            "  elsewhere:  export PREFECT_API_URL=http://HOST:4200/api"
        )
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem:
        raise DeployError(
            f"the Prefect server at {url} does not answer: {problem}\n  `longview doctor` looks closer"
        )
    return str(url)


def deploy(root: Path, options: Options) -> Report:
    """Register everything; say what changed. Raises DeployError."""
    from prefect.client.orchestration import get_client

    check(options)
    report, manifest = Report(), read(root)
    with get_client(sync_client=True) as client:
        kind = options.infrastructure or infrastructure_of(client)
        entries = manifest["deployments"]
        wanted = [specification(root, entry, manifest["pull"], kind) for entry in entries]
        if not options.force:
            refuse_taken(client, root, wanted)
        make_pool(client, root, kind, report)
        for name in devices.names(options.gpus or devices.count()):
            make_slot(client, name, report)
        for entry, specified in zip(entries, wanted, strict=True):
            register(client, specified, entry.get("triggers", []), options, report)
        if options.notify == OFF:
            report.add("notifications", "removed" if automations.switch_off(client) else "unchanged")
        elif options.notify:
            changed = automations.switch_on(client, options.notify)
            report.add("notifications", "changed" if changed else "unchanged")
        if forgets_reservations(client):
            report.warnings.append(FORGETS)
    return report


def forgets_reservations(client: SyncPrefectClient) -> bool:
    """Whether the server keeps the leases of concurrency limits in memory, Prefect's default."""
    settings = client.request("GET", "/admin/settings").json()
    return settings["server"]["concurrency"]["lease_storage"].endswith(".memory")


def check(options: Options) -> None:
    """Refuse what cannot be registered before anything is. Raises DeployError."""
    if options.cron and options.cron != OFF:
        schedule_of(cron=options.cron, timezone=options.timezone)
    elif options.timezone:
        raise DeployError("--timezone is that of --cron: give both")
    if options.notify and options.notify != OFF:
        try:
            automations.block_for(options.notify)
        except ValueError as error:
            raise DeployError(f"--notify: {error}") from None


def read(root: Path) -> dict[str, Any]:
    """prefect.yaml. Raises DeployError."""
    from ruamel.yaml import YAML

    path = root / FILE
    if not path.is_file():
        raise DeployError(f"{path} does not exist: it names the deployments")
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def infrastructure_of(client: SyncPrefectClient) -> str:
    """What runs are started as now."""
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_deployment_by_name("retrain/retrain").work_pool_name
    except ObjectNotFound:
        return "process"
    return next((kind for kind in TEMPLATES if pool == pool_of(kind)), "process")


def make_pool(client: SyncPrefectClient, root: Path, kind: str, report: Report) -> None:
    """The work pool of this kind of infrastructure."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    name, template = pool_of(kind), template_of(root, kind)
    try:
        known = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=name, type=kind, base_job_template=template, concurrency_limit=POOL_RUNS)
        )
        report.add(f"work pool {name}", "created")
        return
    if known.base_job_template == template and known.concurrency_limit == POOL_RUNS:
        report.add(f"work pool {name}", "unchanged")
    else:
        update = WorkPoolUpdate(base_job_template=template, concurrency_limit=POOL_RUNS)
        client.update_work_pool(name, update)
        report.add(f"work pool {name}", "changed")


def template_of(root: Path, kind: str) -> dict[str, Any]:
    """The base job template of a pool: Prefect's own for processes, ours for containers."""
    if kind == "process":
        from prefect.workers.process import ProcessWorker

        return ProcessWorker.get_default_base_job_template()
    return json.loads((root / TEMPLATES[kind]).read_text(encoding="utf-8"))


def make_slot(client: SyncPrefectClient, name: str, report: Report) -> None:
    """A global concurrency limit of one slot."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_global_concurrency_limit_by_name(name)
        report.add(f"slot {name}", "unchanged")
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        report.add(f"slot {name}", "created")
