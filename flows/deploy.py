"""Register this checkout with a Prefect server: work pool, GPU slots, deployments, triggers, notifications.

    longview deploy --cron "0 3 * * *" --drop inbox --notify https://hooks.slack.com/services/…
    longview worker

The deployments stand in prefect.yaml, which `prefect deploy --all` reads, too. Registering again changes only
what differs: runs that are scheduled or queued stay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import automations, devices

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

FILE = "prefect.yaml"
POOL = "longview"
POOL_RUNS = 4
"""Runs of one pool at a time: one of each deployment."""
INSIDE = "/longview"
"""Where containers see the checkout (deploy/docker.json, deploy/kubernetes.json)."""
TEMPLATES = {kind: f"deploy/{kind}.json" for kind in ("docker", "kubernetes")}
OFF = "off"


class DeployError(RuntimeError):
    """Nothing can be registered; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """None keeps what is registered, at first what prefect.yaml says; `off` removes it.

    cron: when `retrain` starts. watch_s: seconds between two looks for new data. infrastructure: process,
    docker or kubernetes, at first process. image: what containers run. gpus: devices of a worker.
    """

    cron: str | None = None
    timezone: str | None = None
    watch_s: int | None = None
    drop: str | None = None
    notify: str | None = None
    infrastructure: str | None = None
    image: str | None = None
    gpus: int | None = None


@dataclass
class Report:
    """What was done: name and `created`, `changed` or `unchanged`, in order."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, did: str) -> None:
        """One more line."""
        self.lines.append((name, did))


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

    report, manifest = Report(), read(root)
    with get_client(sync_client=True) as client:
        kind = options.infrastructure or infrastructure_of(client)
        make_pool(client, root, kind, report)
        for name in devices.names(options.gpus or devices.count()):
            make_slot(client, name, report)
        for entry in manifest["deployments"]:
            wanted = specification(root, entry, manifest["pull"], kind)
            register(client, wanted, entry.get("triggers", []), options, report)
        if options.notify == OFF:
            report.add("notifications", "removed" if automations.switch_off(client) else "unchanged")
        elif options.notify:
            try:
                report.add(
                    "notifications",
                    "changed" if automations.switch_on(client, options.notify) else "unchanged",
                )
            except ValueError as error:
                raise DeployError(f"--notify: {error}") from None
    return report


def read(root: Path) -> dict[str, Any]:
    """prefect.yaml. Raises DeployError."""
    from ruamel.yaml import YAML

    path = root / FILE
    if not path.is_file():
        raise DeployError(f"{path} does not exist: it names the deployments")
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def pool_of(kind: str) -> str:
    """The name of the work pool of a kind of infrastructure."""
    return POOL if kind == "process" else f"{POOL}-{kind}"


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


def specification(root: Path, entry: dict[str, Any], pull: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """What `client.create_deployment` is told of an entry of prefect.yaml, as `prefect deploy` would."""
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Any = load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)
    limit = entry.get("concurrency_limit") or {}
    return {
        "flow_name": flow.name,
        "name": entry["name"],
        "entrypoint": entry["entrypoint"],
        "description": entry.get("description") or flow.description,
        "tags": entry.get("tags", []),
        "parameters": dict(entry.get("parameters") or {}),
        "schedules": [_schedule(**schedule) for schedule in entry.get("schedules", [])],
        "concurrency_limit": limit.get("limit"),
        "collision_strategy": limit.get("collision_strategy"),
        "work_pool_name": pool_of(kind),
        "job_variables": job_variables(root, kind),
        "pull_steps": pull,
        "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
        "enforce_parameter_schema": True,
    }


def job_variables(root: Path, kind: str) -> dict[str, Any]:
    """Where runs find the checkout; the rest is in the pool's base job template."""
    places: dict[str, dict[str, Any]] = {
        "process": {"working_dir": str(root)},
        "docker": {"volumes": [f"{root}:{INSIDE}"]},
        "kubernetes": {},
    }
    return places[kind]


def _schedule(**values: Any) -> dict[str, Any]:
    """A schedule in the form in which the server gives it back. Raises DeployError."""
    from prefect.client.schemas.schedules import construct_schedule

    try:
        return construct_schedule(**values).model_dump(mode="json")
    except ValueError as error:
        raise DeployError(f"schedule {values}: {error}") from None


def register(
    client: SyncPrefectClient,
    wanted: dict[str, Any],
    triggers: list[dict[str, Any]],
    options: Options,
    report: Report,
) -> None:
    """Create the deployment, or change it if it differs; then its triggers."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyOptions
    from prefect.exceptions import ObjectNotFound

    title = f"{wanted['flow_name']}/{wanted['name']}"
    try:
        known = client.read_deployment_by_name(title)
    except ObjectNotFound:
        known = None
    adopt(wanted, known, options)
    if known is None or registered(known, wanted) != wanted:
        values = dict(wanted)
        values["flow_id"] = client.create_flow_from_name(values.pop("flow_name"))
        values["schedules"] = [DeploymentScheduleCreate(schedule=s, active=True) for s in values["schedules"]]
        strategy = values.pop("collision_strategy")
        values["concurrency_options"] = ConcurrencyOptions(collision_strategy=strategy) if strategy else None
        identity = client.create_deployment(**values, paused=known.paused if known else None)
        report.add(title, "changed" if known else "created")
    else:
        identity = known.id
        report.add(title, "unchanged")
    trigger(client, identity, triggers, report)


def adopt(wanted: dict[str, Any], known: Any, options: Options) -> None:
    """Put options in; where there are none, what is registered stays."""
    if known is not None:
        wanted["schedules"] = _schedules(known)
        wanted["parameters"] = {**wanted["parameters"], **known.parameters}
    image = options.image or (known.job_variables.get("image") if known is not None else None)
    if image and wanted["work_pool_name"] != POOL:
        wanted["job_variables"]["image"] = image
    if wanted["name"] == "retrain" and options.cron:
        off = options.cron == OFF
        wanted["schedules"] = [] if off else [_schedule(cron=options.cron, timezone=options.timezone)]
    if wanted["name"] == "data-watch" and options.watch_s:
        wanted["schedules"] = [_schedule(interval=options.watch_s, anchor_date="2026-01-01T00:00:00+00:00")]
    if wanted["name"] == "data-watch" and options.drop:
        wanted["parameters"] = {} if options.drop == OFF else {"drop": options.drop}


def _schedules(known: Any) -> list[dict[str, Any]]:
    return [entry.schedule.model_dump(mode="json") for entry in known.schedules]


def registered(known: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the server has, in the form of `specification`."""
    limit, options = known.global_concurrency_limit, known.concurrency_options
    strategy = options.collision_strategy.value if options else None
    other = {
        "flow_name": wanted["flow_name"],  # both are what it was found by
        "name": wanted["name"],
        "schedules": _schedules(known),
        "concurrency_limit": limit.limit if limit else None,
        "collision_strategy": strategy,
    }
    return {key: other[key] if key in other else getattr(known, key) for key in wanted}


def trigger(client: SyncPrefectClient, identity: Any, wanted: list[dict[str, Any]], report: Report) -> None:
    """The automations that start a deployment, owned by it as those of `prefect deploy` are."""
    from prefect.events import DeploymentEventTrigger

    owner = f"prefect.deployment.{identity}"
    known = {automation.name: automation for automation in client.read_resource_related_automations(owner)}
    for specified in wanted:
        event = DeploymentEventTrigger(**specified)
        event.set_deployment_id(identity)
        automation = event.as_automation()
        found = known.get(automation.name)
        if found is None:
            client.create_automation(automation)
        elif not automations.same(found, automation):
            client.update_automation(found.id, automation)
        did = (
            "created" if found is None else "unchanged" if automations.same(found, automation) else "changed"
        )
        report.add(f"trigger '{automation.name}'", did)
