"""One deployment of prefect.yaml, told to a Prefect server: created, changed if it differs, else left alone.

longview deploy        # registers them all (flows/deploy.py)
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import automations

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOL = "longview"
INSIDE = "/longview"
"""Where containers see the checkout (deploy/docker.json, deploy/kubernetes.json)."""
OFF = "off"
EPOCH = "2026-01-01T00:00:00+00:00"
"""From which intervals are counted, so that registering again moves none."""


class DeployError(RuntimeError):
    """Nothing can be registered; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """None keeps what is registered, at first what prefect.yaml says; `off` removes it.

    cron: when `retrain` starts. watch_s: seconds between two looks for new data. infrastructure: process,
    docker or kubernetes, at first process. image: what containers run. gpus: devices of a worker. force: take
    over the deployments of another checkout.
    """

    cron: str | None = None
    timezone: str | None = None
    watch_s: int | None = None
    drop: str | None = None
    notify: str | None = None
    infrastructure: str | None = None
    image: str | None = None
    gpus: int | None = None
    force: bool = False


@dataclass
class Report:
    """What was done: name and `created`, `changed` or `unchanged`, in order; what to see to."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, did: str) -> None:
        """One more line."""
        self.lines.append((name, did))


def pool_of(kind: str) -> str:
    """The name of the work pool of a kind of infrastructure."""
    return POOL if kind == "process" else f"{POOL}-{kind}"


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
        "schedules": [schedule_of(**schedule) for schedule in entry.get("schedules", [])],
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
        "process": {"working_dir": str(root), "command": "python -m flows.engine"},
        "docker": {"volumes": [f"{root}:{INSIDE}"]},
        "kubernetes": {},
    }
    return places[kind]


def place_of(job_variables: dict[str, Any]) -> str | None:
    """The checkout where runs with these job variables work; None where their pool has it (Kubernetes)."""
    mounted, volumes = f":{INSIDE}", job_variables.get("volumes", ())
    mounts = [volume.removesuffix(mounted) for volume in volumes if volume.endswith(mounted)]
    return job_variables.get("working_dir") or next(iter(mounts), None)


def refuse_taken(client: SyncPrefectClient, root: Path, wanted: list[dict[str, Any]]) -> None:
    """Raise DeployError if one of these deployments is registered from another checkout: its schedules and
    triggers would from now on, and without a word, start runs in this one."""
    from prefect.exceptions import ObjectNotFound

    for each in wanted:
        title = f"{each['flow_name']}/{each['name']}"
        with suppress(ObjectNotFound):
            place = place_of(client.read_deployment_by_name(title).job_variables)
            if place and Path(place).resolve() != root.resolve():
                raise DeployError(
                    f"{title} of this Prefect server belongs to another checkout:\n"
                    f"  registered:     {place}\n"
                    f"  this checkout:  {root}\n"
                    "  to use both:    a Prefect server each (PREFECT_API_URL; `longview up` starts one)\n"
                    "  to take over:   longview deploy --force; runs then take place in this checkout alone"
                )


def schedule_of(*, active: bool = True, **values: Any) -> dict[str, Any]:
    """A schedule (cron, timezone, interval in seconds, …) as the server gives it back. Raises DeployError."""
    from prefect.client.schemas.schedules import construct_schedule

    try:
        return {"schedule": construct_schedule(**values).model_dump(mode="json"), "active": active}
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
        values["schedules"] = [DeploymentScheduleCreate(**schedule) for schedule in values["schedules"]]
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
        wanted["schedules"] = [] if off else [schedule_of(cron=options.cron, timezone=options.timezone)]
    if wanted["name"] == "data-watch" and options.watch_s:
        wanted["schedules"] = [schedule_of(interval=options.watch_s, anchor_date=EPOCH)]
    if wanted["name"] == "data-watch" and options.drop:
        wanted["parameters"] = {} if options.drop == OFF else {"drop": options.drop}


def _schedules(known: Any) -> list[dict[str, Any]]:
    return [{"schedule": s.schedule.model_dump(mode="json"), "active": s.active} for s in known.schedules]


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
        did = automations.put(client, automation, known.get(automation.name))
        report.add(f"trigger '{automation.name}'", did)
