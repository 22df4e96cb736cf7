"""What a person reads on a phone: a run in five lines, and the automations that send it.

    longview deploy --notify https://hooks.slack.com/services/…     # or any webhook, or an Apprise URL
    python -m flows.notify                                          # the lines of what artifacts/ holds now

A run that did something ends with the event `longview.run.finished`, which carries its summary; the Prefect
server sends it on. Runs that failed or crashed are seen by the server itself, so that a dead machine is told
of, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

FINISHED = "longview.run.finished"
BLOCK = "longview"
FLOWS = ("retrain", "data-watch", "rollback", "compare")
COMPARISON, DECISION = Path("artifacts/compare/comparison.json"), Path("artifacts/promote/decision.json")


class Done(Protocol):
    """What a run did (flows.retrain.Summary)."""

    data_version: str
    ran: list[str]
    restored: list[str]
    tag: str | None


def finished(root: Path, done: Done, seconds: float) -> None:
    """Publish the summary of a run: a Prefect artifact, and the event that notifications are made from."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.events import emit_event
    from prefect.runtime import flow_run

    lines = summary(root, done, seconds)
    create_markdown_artifact("\n".join(f"- {line}" for line in lines), key="summary")
    emit_event(
        FINISHED,
        resource={"prefect.resource.id": f"longview.run.{flow_run.id}", "prefect.resource.name": "run"},
        payload={"summary": "\n".join(lines), "tag": done.tag, "data": done.data_version},
    )


def summary(root: Path, done: Done, seconds: float) -> list[str]:
    """What ran, how long, on which data; accuracy before and after; the decision; what to do next."""
    restored = f", {len(done.restored)} restored" if done.restored else ""
    decided = set(done.ran + done.restored) & {"compare", "promote"}
    lines = [
        f"{len(done.ran)} stages run{restored} in {_span(seconds)}: {_listed(done.ran or done.restored)}",
        f"data {done.data_version[:8]}" + (f", version {done.tag}" if done.tag else ""),
    ]
    decision = _read(root / DECISION) if decided else None
    if not decision:
        return [*lines, "next: `longview status` shows what is left to run"]
    return [*lines, *_outcome(decision, _read(root / COMPARISON))]


def _outcome(decision: dict[str, Any], comparison: dict[str, Any] | None) -> list[str]:
    """Before and after are of the same questions: before = after − their paired difference."""
    change, candidate = decision["reasoning"], decision["candidate"]
    shares = ((comparison or {}).get("systems", {}).get(candidate) or {}).get("accuracy", {})
    after = shares.get("reasoning", {}).get("mean")
    lines = []
    if change.get("n") and after is not None:
        lines.append(
            f"accuracy {after - change['mean']:.1%} → {after:.1%}, {_points(change['mean'])} points "
            f"(95%: {_points(change['low'])} to {_points(change['high'])}, n = {change['n']:,})"
        )
    if decision["decision"] == "promote":
        return [
            *lines,
            f"{candidate} is champion now, before it {decision['opponent']}",
            "next: `longview report`; to undo: `longview model rollback`",
        ]
    return [
        *lines,
        f"{candidate} is not promoted: {decision['opponent']} stays",
        "next: nothing; why: `longview report`",
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names if len(names) <= most else [*names[: most - 2], "…", names[-1]])


def _span(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# The automations ---------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One automation: its name, the events it waits for, whose they are, and what it sends (Jinja)."""

    name: str
    expect: frozenset[str]
    match: str
    subject: str
    body: str
    of_flows: bool = False


WHERE = "{{ flow_run | ui_url }}"
MESSAGES = (
    Message(
        "longview run finished",
        frozenset({FINISHED}),
        "longview.run.*",
        "Longview: a run finished",
        "{{ event.payload.summary }}",
    ),
    Message(
        "longview run failed",
        frozenset({"prefect.flow-run.Failed", "prefect.flow-run.TimedOut"}),
        "prefect.flow-run.*",
        "Longview: {{ flow.name }} failed",
        "{{ flow_run.state.message | truncate(600) }}\n"
        f"next: correct the cause, then run again: finished stages are kept\n{WHERE}",
        of_flows=True,
    ),
    Message(
        "longview run crashed",
        frozenset({"prefect.flow-run.Crashed"}),
        "prefect.flow-run.*",
        "Longview: {{ flow.name }} crashed",
        "{{ flow_run.state.message | truncate(600) }}\n"
        f"next: the next run continues where it stopped (`longview run`)\n{WHERE}",
        of_flows=True,
    ),
    Message(
        "longview data refused",
        frozenset({"longview.data.refused"}),
        "longview.data",
        "Longview: data refused",
        "{{ event.payload.name }}: {{ event.payload.reason | truncate(600) }}\n"
        "next: `longview data check` shows each record; drop a mended copy under another name",
    ),
)


def block_for(url: str) -> NotificationBlock:
    """The Prefect block that sends to `url`: Slack, any HTTP webhook (JSON with `text`), what Apprise knows.

    Raises ValueError if `url` is none of these.
    """
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from pydantic import SecretStr

    if url.startswith(("https://", "http://")) and "hooks.slack" not in url:
        return CustomWebhookNotificationBlock(
            name=BLOCK,
            url="{{url}}",
            json_data={"text": "{{subject}}\n{{body}}"},
            secrets={"url": url},
        )
    from apprise import Apprise

    if "://" not in url or Apprise.instantiate(url) is None:
        raise ValueError(
            f"'{url.split('://')[0]}': neither http(s) nor a notification URL that Apprise knows"
        )
    return SlackWebhook(url=SecretStr(url))  # hands any Apprise URL on


def automations(block_id: Any) -> list[AutomationCore]:
    """Every automation, sending by the block with this id."""
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ours = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
    return [
        AutomationCore(
            name=message.name,
            description="made by `longview deploy --notify`",
            trigger=EventTrigger(
                expect=set(message.expect),
                match={"prefect.resource.id": message.match},  # type: ignore[arg-type]
                match_related=ours if message.of_flows else {},  # type: ignore[arg-type]
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                SendNotification(block_document_id=block_id, subject=message.subject, body=message.body)
            ],
        )
        for message in MESSAGES
    ]


def switch_on(client: SyncPrefectClient, url: str) -> bool:
    """Send notifications to `url`; whether anything had to change."""
    block = block_for(url)
    document, changed = _saved(block)
    for wanted in automations(document):
        found = client.read_automations_by_name(wanted.name)
        if found and same(found[0], wanted):
            continue
        changed = True
        if found:
            client.update_automation(found[0].id, wanted)
        else:
            client.create_automation(wanted)
    return changed


def switch_off(client: SyncPrefectClient) -> bool:
    """Send nothing any more; whether anything had to change."""
    found = [a for message in MESSAGES for a in client.read_automations_by_name(message.name)]
    for automation in found:
        client.delete_automation(automation.id)
    return bool(found)


def _saved(block: NotificationBlock) -> tuple[Any, bool]:
    """The id of the block on the server, saved if it is new or another; and whether it was."""
    try:
        known = type(block).load(BLOCK)
    except ValueError:
        known = None
    if known is not None and known == block:
        return known._block_document_id, False
    return block.save(BLOCK, overwrite=True), True


def same(found: Any, wanted: AutomationCore) -> bool:
    """Whether the server has the automation as it is wanted."""
    fields = {"name", "description", "enabled", "trigger", "actions"}
    kept = {"trigger": {"id"}, "actions": {"__all__": {"id"}}}
    return found.model_dump(include=fields, exclude=kept) == wanted.model_dump(include=fields, exclude=kept)


def main() -> None:
    """Print the summary that the artifacts give."""
    from types import SimpleNamespace

    from flows import data
    from flows.environment import root

    base = root()
    done = SimpleNamespace(
        data_version=data.version(base) or "unknown", ran=["compare", "promote"], restored=[], tag=None
    )
    print("\n".join(summary(base, done, 0)))


if __name__ == "__main__":
    main()
