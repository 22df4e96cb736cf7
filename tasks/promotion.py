"""What a decision does to the registry: register the candidate, wait or set the alias. May be repeated.

    python -m tasks.promote --apply        # on this checkout's decision.json

One call of MLflow makes a version champion: that which sets the alias. What explains it is written before,
what is left to clear up after, so that a kill between any two calls leaves the old champion or the new one,
and the same function called again ends as if nothing had happened. Whoever may edit the model may call any of
them: no tag of a version and no alias is deleted (tasks/registry.py).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from models import results
from tasks import tracking
from tasks.registry import (
    AWAITING,
    BASE,
    CHALLENGER,
    DECLINED,
    Agents,
    Awaiting,
    Change,
    Declined,
    Registry,
    Version,
    answers_folder,
    text,
)

Ruling = Literal["promote", "keep"]
State = Literal["champion", "kept", "declined", "waiting"]


@dataclass(frozen=True)
class Approval:
    """A person decides within `timeout_h` hours whether a candidate that passed the gate becomes champion;
    if nobody does, `default` holds."""

    timeout_h: float
    default: Ruling = "keep"

    def __post_init__(self) -> None:
        if self.timeout_h <= 0:
            raise ValueError(f"timeout_h: expected more than 0 hours, found {self.timeout_h}")


@dataclass(frozen=True)
class Candidate:
    """The generation that was decided on, with what is kept of it. Tags that are None are left out."""

    generation: str
    agents: Agents
    predictions: Path
    tags: Mapping[str, str | None]


@dataclass(frozen=True)
class Outcome:
    """What became of the candidate. `question`: to a person, in Markdown, if it waits since now."""

    state: State
    version: Version
    sentence: str
    question: str = ""


def settle(
    registry: Registry,
    decision: Mapping[str, Any],
    candidate: Candidate,
    approval: Approval | None = None,
    run: str | None = None,
) -> Outcome:
    """Make the registry say what the decision says. `run`: the Prefect run that may ask a person."""
    take_default(registry)
    passed = decision["decision"] == "promote"
    version = register(registry, candidate, renew=passed)
    champion, waiting = registry.champion(), registry.waiting()
    if champion == version:
        promote(registry, version, "gate", decision["reason"])  # a kill may have left something to clear up
        return Outcome("champion", version, f"{version.title} is champion")
    if not passed:
        if waiting == version:
            decline(registry, version, "gate", decision["reason"])
        elif waiting is None:
            registry.client.set_registered_model_alias(registry.model, CHALLENGER, version.number)
        return Outcome("kept", version, f"{version.title} is registered as challenger: {decision['reason']}")
    if version.declined:
        no = version.declined
        _clear(registry, version, AWAITING)  # a kill may have left it
        return Outcome(
            "declined",
            version,
            f"{version.title} stays down ({no.how}, {no.who}, {no.when[:10]}: {no.reason})",
        )
    if champion and _agents(decision, "opponent") != champion.agents:
        return Outcome("kept", version, _overtaken(version, champion, decision))
    if approval is None or (version.awaiting is None and _was_champion(registry, version)):
        over = _opponent(registry, decision)
        promote(registry, version, "gate", decision["reason"], over=over)
        return Outcome("champion", version, f"{version.title} is champion: {decision['reason']}")
    new = version.awaiting is None
    version = await_approval(registry, version, approval, _opponent(registry, decision), run)
    assert version.awaiting
    sentence = f"{version.title} waits for approval until {version.awaiting.until[:16]} UTC"
    return Outcome("waiting", version, sentence, describe(registry, version, decision) if new else "")


def describe(registry: Registry, version: Version, decision: Mapping[str, Any]) -> str:
    """The question to a person: the candidate, and the figures of the gate, in Markdown."""
    opponent = registry.version(version.over) if decision["opponent"] != BASE else None
    rows = []
    for name in ("reasoning", "perception"):
        now, gain = version.accuracy.get(name), decision[name]
        before = opponent.accuracy.get(name) if opponent else None
        if now and now["n"]:
            difference = " to ".join(f"{100 * gain[part]:+.1f}" for part in ("low", "high"))
            mean = f"{100 * gain['mean']:+.1f}"
            rows.append(f"| {name} | {share(before)} | {share(now)} | {mean} ({difference}) |")
    default = version.awaiting.default if version.awaiting else "keep"
    return "\n".join(
        [
            f"**{version.title}** passed the gate against {decision['opponent']}. Shall it become champion?",
            "",
            f"| test questions | {decision['opponent']} | {version.title} | points, paired 95% interval |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Data version {version.tags.get('data_version', 'unknown')}; "
            f"{version.tags.get('run', 'no version in git')}. Nobody answers in time: {default}.",
        ]
    )


def share(found: Mapping[str, Any] | None) -> str:
    """61.2 (58.7–63.6), in %; a dash for none."""
    return results.percent(found) if found and found["n"] else "–"


def register(registry: Registry, candidate: Candidate, *, renew: bool) -> Version:
    """The candidate's version, made unless it is there. `renew`: from now on these are its answers."""
    import mlflow

    agents, client = candidate.agents, registry.client
    tags = {name: value for name, value in candidate.tags.items() if value is not None}
    known = registry.with_agents(agents)
    model_id = known.model_id if known else _logged_model(registry, candidate.generation, agents.reasoning)
    if known is None or renew:
        client.log_model_artifact(model_id, str(candidate.predictions), answers_folder(agents))
    if known is None:
        own = {
            "generation": candidate.generation,
            "checkpoint_md5": agents.reasoning,
            "summary_md5": agents.summary,
        }
        known_now = mlflow.register_model(f"models:/{model_id}", registry.model, tags=own | tags)
        return _again(registry, str(known_now.version))
    for name, value in tags.items():
        if name not in known.tags or (renew and name == "accuracy" and known.tags[name] != value):
            client.set_model_version_tag(registry.model, known.number, name, value)
    return _again(registry, known.number)


def promote(
    registry: Registry, version: Version, how: str, reason: str, *, who: str = "", over: str | None = None
) -> None:
    """Make the version champion. `over`: whom the gate compared it with, for a later run of the gate."""
    client, champion = registry.client, registry.champion()
    if champion != version:
        before = champion.number if champion else None
        _note(registry, Change(_now(), how, who or user(), reason, before, version.number))
        waiting = registry.waiting()
        if waiting and waiting != version:
            decline(registry, waiting, "superseded", f"{version.title} became champion", who)
        if over is None and "promoted_over" not in version.tags:
            over = before or BASE
        tags = {"promoted_over": over, "reason": reason, "who": who or user()}
        for name, value in tags.items():
            if value is not None and version.tags.get(name) != value:
                client.set_model_version_tag(registry.model, version.number, name, value)
        if before and registry.stored_aliases().get(CHALLENGER) == before:  # on the champion it names nobody
            client.set_registered_model_alias(registry.model, CHALLENGER, version.number)
        client.set_registered_model_alias(registry.model, registry.alias, version.number)
    for tag in (AWAITING, DECLINED):  # in this order: without the second the first would hold again
        _clear(registry, version, tag)


def await_approval(
    registry: Registry, version: Version, approval: Approval, over: str, run: str | None
) -> Version:
    """Mark the version as waiting, unless it is; what waited before it is superseded."""
    client, waiting = registry.client, registry.waiting()
    if waiting and waiting != version:
        decline(registry, waiting, "superseded", f"{version.title} passed the gate after it")
    if version.awaiting is None:
        until = datetime.now(UTC) + timedelta(hours=approval.timeout_h)
        value = text(Awaiting(until.isoformat(timespec="seconds"), approval.default, run))
        client.set_model_version_tag(registry.model, version.number, "promoted_over", over)
        client.set_model_version_tag(registry.model, version.number, AWAITING, value)
    if waiting != version:
        client.set_registered_model_alias(registry.model, CHALLENGER, version.number)
    return _again(registry, version.number)


def rule(
    registry: Registry, number: str, ruling: Ruling, reason: str, *, who: str = "", how: str = "approval"
) -> Version:
    """End a version's wait; nothing happens if it has ended."""
    version = _again(registry, number)
    if version.awaiting is None:
        return version
    if ruling == "promote":
        promote(registry, version, how, reason, who=who)
    else:
        decline(registry, version, how, reason, who)
    return _again(registry, number)


def take_default(registry: Registry) -> Version | None:
    """End the wait of a candidate about which nobody said anything in time; None if there is none."""
    version = registry.waiting()
    if version is None or version.awaiting is None or not version.awaiting.overdue(datetime.now(UTC)):
        return None
    ruling: Ruling = "promote" if version.awaiting.default == "promote" else "keep"
    reason = f"nobody decided before {version.awaiting.until[:16]} UTC, and the default is to {ruling}"
    return rule(registry, version.number, ruling, reason, how="time-out")


def roll_back(registry: Registry, target: Version, reason: str) -> None:
    """Make an earlier version champion; the gate will not put the one taken down back by itself."""
    champion = registry.champion()
    if champion and champion != target:
        decline(registry, champion, "rollback", reason)
    promote(registry, target, "rollback", reason)


def decline(registry: Registry, version: Version, how: str, reason: str, who: str = "") -> None:
    """Note why the version is not champion, and end its wait."""
    value = text(Declined(_now(), how, who or user(), reason))
    registry.client.set_model_version_tag(registry.model, version.number, DECLINED, value)
    _clear(registry, version, AWAITING)


def user() -> str:
    """Who does it: git's name and address, else the name of the account."""
    import getpass

    said = []
    for key in ("user.name", "user.email"):
        with suppress(OSError):
            done = subprocess.run(["git", "config", key], capture_output=True, text=True)
            said.append(done.stdout.strip())
    name, mail = [*said, "", ""][:2]
    if name or mail:
        return f"{name} <{mail}>".strip() if mail else name
    with suppress(KeyError, OSError):  # a container may run as a user without a name
        return getpass.getuser()
    return "unknown"


def facts(decision: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, str]:
    """The tags that a decision gives its candidate."""
    system = comparison["systems"].get(decision["candidate"], {})
    kept = {name: system["accuracy"][name] for name in ("reasoning", "perception") if "accuracy" in system}
    return {"accuracy": json.dumps(kept), "reason": decision["reason"], "who": user()}


def _opponent(registry: Registry, decision: Mapping[str, Any]) -> str:
    """The version that was champion when the gate decided, or "base"."""
    agents = _agents(decision, "opponent")
    found = registry.with_agents(agents) if agents else None
    return found.number if found else BASE


def _agents(decision: Mapping[str, Any], of: str) -> Agents | None:
    found = decision.get(f"{of}_agents")
    return Agents(**found) if found else None


def _overtaken(version: Version, champion: Version, decision: Mapping[str, Any]) -> str:
    return (
        f"{version.title} is not promoted: it was compared with {decision['opponent']}, and since then "
        f"{champion.title} became champion. To compare it with that one: "
        "`dvc repro --force --single-item promote`, then `longview run`"
    )


def _was_champion(registry: Registry, version: Version) -> bool:
    return any(change.after == version.number for change in registry.history())


def _note(registry: Registry, change: Change) -> None:
    """Write the change down before it is made. One that was written and never made is dropped."""
    history, client = registry.history(), registry.client
    if history and history[-1].before == change.before != history[-1].after:
        if (history[-1].after, history[-1].how) == (change.after, change.how):
            return
        client.delete_registered_model_tag(registry.model, history[-1].key)
    client.set_registered_model_tag(registry.model, change.key, text(change))


def _logged_model(registry: Registry, generation: str, checkpoint_md5: str) -> str:
    """The logged model with these bytes; made now if this store has never seen the checkpoint."""
    import mlflow

    experiment = tracking.experiment_id(registry.client)
    found = tracking.models_with(registry.client, experiment, checkpoint_md5)
    if found:
        return found[0].model_id
    own = {"checkpoint_md5": checkpoint_md5, "kind": "reasoning"}
    return mlflow.create_external_model(
        generation, tags=own, params=own, model_type="reasoning", experiment_id=experiment
    ).model_id


def _clear(registry: Registry, version: Version, tag: str) -> None:
    """The tag holds no longer."""
    if _again(registry, version.number).tags.get(tag):
        registry.client.set_model_version_tag(registry.model, version.number, tag, "")


def _again(registry: Registry, number: str) -> Version:
    """The version as it is now."""
    found = registry.version(number)
    if found is None:
        raise tracking.TrackingError(
            f"version {number} of {registry.model} was deleted meanwhile. Run again."
        )
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
