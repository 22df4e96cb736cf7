"""The automations by which the Prefect server tells of runs that finished, failed or wait, and of bad data.

    longview deploy --notify https://hooks.slack.com/services/…     # or any webhook, or an Apprise URL

The server sends them itself, so that a run whose machine died is told of, too. Subjects and texts are Jinja
templates over the event, the flow run and its flow.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flows.data_watch import REFUSAL, RESOURCE
from flows.notify import AWAITED, FINISHED

if TYPE_CHECKING:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

BLOCK = "longview"
FLOWS = ("retrain", "rollback", "compare")


@dataclass(frozen=True)
class Message:
    """One automation: its name, the events it waits for, whose they are, and what it sends (Jinja).

    flows: names of those whose runs it tells of. once_in: after it has sent, it is silent for so long.
    """

    name: str
    expect: frozenset[str]
    match: str
    subject: str
    body: str
    flows: tuple[str, ...] = ()
    once_in: timedelta = timedelta(0)


PROBLEM = (
    "{% set text = flow_run.state.message or '' %}"
    "{{ text.replace('Flow run encountered an exception: ', '').split('\n')[0] | truncate(300) }}"
)
ADVICE = (
    "{% for line in text.split('\n') if 'what to do' in line %}{{ line.strip() }}"
    "{% else %}next: correct the cause and run again: finished stages are kept{% endfor %}"
)
WHERE = "{{ (flow_run | ui_url) or '' }}"
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
        "\n".join([PROBLEM, ADVICE, WHERE]),
        FLOWS,
    ),
    Message(
        "longview data-watch failed",
        frozenset({"prefect.flow-run.Failed"}),
        "prefect.flow-run.*",
        "Longview: looking for new data fails",
        "\n".join([PROBLEM, WHERE]),
        ("data-watch",),
        once_in=timedelta(hours=12),  # it fails every five minutes until the cause is gone
    ),
    Message(
        "longview run crashed",
        frozenset({"prefect.flow-run.Crashed"}),
        "prefect.flow-run.*",
        "Longview: {{ flow.name }} crashed",
        "\n".join(
            [PROBLEM, "next: `longview run` continues where it stopped; so does the next schedule", WHERE]
        ),
        FLOWS,
    ),
    Message(
        "longview approval awaited",
        frozenset({AWAITED}),
        "longview.run.*",
        "Longview: {{ event.payload.candidate }} waits for approval",
        "{{ event.payload.question.split('\n')[0] | replace('**', '') }}\n"
        "until {{ event.payload.until }} UTC: `longview model approve --reason …`, or with --reject; or the "
        "form on the run's page",
    ),
    Message(
        "longview data refused",
        frozenset({REFUSAL}),
        RESOURCE["prefect.resource.id"],
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
    from prefect.types import SecretDict
    from pydantic import SecretStr

    if url.startswith(("https://", "http://")) and not url.startswith("https://hooks.slack"):
        return CustomWebhookNotificationBlock(
            name=BLOCK,
            url="{{url}}",
            json_data={"text": "{{subject}}\n{{body}}"},
            headers=None,
            cookies=None,
            secrets=SecretDict({"url": url}),
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

    return [
        AutomationCore(
            name=message.name,
            description="made by `longview deploy --notify`",
            trigger=EventTrigger(
                expect=set(message.expect),
                match={"prefect.resource.id": message.match},
                match_related=_of(message.flows),
                posture=Posture.Reactive,
                threshold=1,
                within=message.once_in,
            ),
            actions=[
                SendNotification(block_document_id=block_id, subject=message.subject, body=message.body)
            ],
        )
        for message in MESSAGES
    ]


def _of(flows: tuple[str, ...]) -> dict[str, str | list[str]]:
    """What an event must be related to."""
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)} if flows else {}


def switch_on(client: SyncPrefectClient, url: str) -> bool:
    """Send notifications to `url`; whether anything had to change."""
    block = block_for(url)
    document, changed = _saved(block)
    for wanted in automations(document):
        found = client.read_automations_by_name(wanted.name)
        changed |= put(client, wanted, found[0] if found else None) != "unchanged"
    return changed


def switch_off(client: SyncPrefectClient) -> bool:
    """Send nothing any more; whether anything had to change."""
    found = [a for message in MESSAGES for a in client.read_automations_by_name(message.name)]
    for automation in found:
        client.delete_automation(automation.id)
    return bool(found)


def _saved(block: NotificationBlock) -> tuple[Any, bool]:
    """The id of the block on the server, saved if it is new or another; and whether it was."""
    known: Any = None
    with suppress(ValueError):  # none of that name and kind
        known = type(block).load(BLOCK)
    fields = set(type(block).model_fields)
    if known is not None and known.model_dump(include=fields) == block.model_dump(include=fields):
        return known._block_document_id, False
    return block.save(BLOCK, overwrite=True), True


def put(client: SyncPrefectClient, wanted: AutomationCore, found: Any) -> str:
    """Create the automation, or change the one `found` if it differs; one switched off stays off."""
    if found is None:
        client.create_automation(wanted)
        return "created"
    fields = {"name", "description", "enabled", "trigger", "actions"}
    made: dict[str, Any] = {"trigger": {"id"}, "actions": {"__all__": {"id"}}}
    wanted = wanted.model_copy(update={"enabled": found.enabled})
    if found.model_dump(include=fields, exclude=made) == wanted.model_dump(include=fields, exclude=made):
        return "unchanged"
    client.update_automation(found.id, wanted)
    return "changed"
