"""The end of a run: its decision carried out in the registry, after a person's approval if asked for.

    longview run        # calls `settle` once the data is in the remote and the run is a version

What waits is kept in the registry (the alias `challenger` and the tag `awaiting`), so a killed run loses
nothing and nobody is asked twice. With a Prefect server that stays, the run pauses, and its page there shows
a form; otherwise it ends, and the candidate waits for `longview model approve`.
"""

from __future__ import annotations

from contextlib import chdir, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.input.run_input import keyset_from_base_key
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Running
from pydantic import Field

from flows import notify
from flows.settled import is_settled, note_settled
from flows.versions import RunVersion
from flows.walk import say
from tasks import params, promote, promotion
from tasks.promotion import Outcome, State
from tasks.registry import Registry, Version

KEY = "approval"
POLL_S = 5
HOW = "`longview model approve --reason …`, or with --reject"


class Ruling(RunInput):
    """The form: what a person says about a candidate that passed the gate."""

    decision: Literal["promote", "keep"] = Field(description="Make it champion, or keep the champion")
    reason: str = Field(min_length=1, description="Why; it is kept with the version")
    who: str = Field(min_length=1, description="Your name")


def settle(root: Path, version: RunVersion | None) -> State | None:
    """Register the candidate of decision.json as made by this run; set the alias, or ask. May be repeated.

    Returns what became of the candidate; None if that was settled before, or there is no registry.
    """
    if is_settled(root):
        return None
    made: dict[str, str | None] = {"run": version.tag, "commit": version.commit} if version else {}
    done = carry_out(str(root), made, str(flow_run.id) if _stays() else None)
    state = done.state if done else None
    if done and done.state == "waiting" and done.version.awaiting:
        number, asked = done.version.number, done.version.awaiting.run
        answer = ask(done) if done.question and _stays() else (_left(asked) if asked else None)
        asked_now = bool(done.question and _stays())
        ended = rule(str(root), number, answer) if answer else time_out(str(root)) if asked_now else None
        if ended:
            state = "declined" if ended.declined else "champion"
            say(_ended(ended))
        else:
            say("the wait was ended by somebody else" if asked_now else f"decide: {HOW}")
    note_settled(root, _until(root) if done else None)
    return state


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=10)
def carry_out(root: str, made: dict[str, str | None], run: str | None) -> Outcome | None:
    """decision.json in the registry: the version, its tags, and an alias."""
    with chdir(root):
        done = promote.apply(params.load("promote", promote.Params), version=made, prefect_run=run)
    say(done.sentence if done else "the registry is unchanged: tracking is off, or there is no checkpoint")
    return done


def ask(candidate: Outcome) -> Ruling | None:
    """Pause the run until somebody fills in the form; None if nobody did in time."""
    awaiting = candidate.version.awaiting
    assert awaiting
    left = (datetime.fromisoformat(awaiting.until) - datetime.now(UTC)).total_seconds()
    form = Ruling.with_initial_data(description=candidate.question)
    notify.awaited(candidate.version.title, awaiting.until, candidate.question)
    say(f"paused; decide on the run's page in Prefect, or {HOW}")
    try:
        answer = pause_flow_run(
            wait_for_input=form, timeout=max(1, round(left)), poll_interval=POLL_S, key=KEY
        )
    except FlowPauseTimeout:
        with get_client(sync_client=True) as client:  # Prefect itself would let the run fail
            client.set_flow_run_state(UUID(str(flow_run.id)), Running(), force=True)
        return None
    return Ruling(decision=answer.decision, reason=answer.reason, who=answer.who)


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=10)
def rule(root: str, number: str, answer: Ruling) -> Version:
    """What the person said, in the registry, unless the command has put it there already."""
    with chdir(root):
        return promotion.rule(_registry(), number, answer.decision, answer.reason, who=answer.who)


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=10)
def time_out(root: str) -> Version | None:
    """The default, because nobody said anything; None if somebody else ended the wait."""
    with chdir(root):
        return promotion.take_default(_registry())


def resume(run: str | None, ruling: Ruling) -> bool:
    """Let the paused Prefect run go on with this answer. False: no run is paused, or its server is away."""
    if run is None or not _stays():
        return False
    with suppress(Exception), get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run))
        if found.state and found.state.is_paused():
            client.resume_flow_run(UUID(run), run_input=ruling.model_dump())
            return True
    return False


def _left(run: str) -> Ruling | None:
    """What somebody filled in for a run that was killed before it could read it."""
    with suppress(Exception):  # no answer, another server, or a server that is away
        answer: Any = Ruling.load(keyset_from_base_key(f"paused-{KEY}"), flow_run_id=UUID(run))
        return Ruling(decision=answer.decision, reason=answer.reason, who=answer.who)
    return None


def _stays() -> bool:
    """Whether the Prefect server outlives the run."""
    return bool(PREFECT_API_URL.value())


def _registry() -> Registry:
    settings = params.load("promote", promote.Params)
    return Registry(settings.model, settings.alias)


def _ended(version: Version) -> str:
    no = version.declined
    return (
        f"{version.title} is not promoted: {no.reason} ({no.who})" if no else f"{version.title} is champion"
    )


def _until(root: Path) -> str | None:
    with chdir(root):
        waiting = _registry().waiting()
    return waiting.awaiting.until if waiting and waiting.awaiting else None
