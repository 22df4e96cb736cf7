"""The MLflow registry, read: which generation is champion, who was before, what waits, and their answers.

    python -c "from tasks.registry import Registry; print(Registry().champion())"

A generation that was a candidate is a version of one registered model. Its tags hold the md5s of its two
checkpoints (DVC holds the weights), the run that made it and its accuracy; its logged model holds its
predictions. Changes of the champion are tags of the registered model. tasks/promotion.py writes all of it.

Nothing of it is ended by deleting: in a team's MLflow only who made a model may delete its versions' tags and
its aliases, and everybody may decide. A tag that no longer holds is empty, and reads as none; the alias
`challenger` on the champion names nobody.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from models.records import read_jsonl
from tasks import tracking

PREDICTIONS = "predictions.jsonl"
BASE = "base"
CHALLENGER = "challenger"
AWAITING, DECLINED, CHANGE = "awaiting", "declined", "change."


@dataclass(frozen=True)
class Agents:
    """Which generation this is: md5 of the reasoning agent's checkpoint and of the summary agent's."""

    reasoning: str
    summary: str


@dataclass(frozen=True)
class Awaiting:
    """A candidate's wait for a person. `until`: ISO time; then `default` holds. `run`: its Prefect run."""

    until: str
    default: str
    run: str | None = None

    def overdue(self, now: datetime) -> bool:
        """Whether nobody said anything in time."""
        return datetime.fromisoformat(self.until) <= now


@dataclass(frozen=True)
class Declined:
    """Why a version that passed the gate is not champion: the gate does not put it back by itself."""

    when: str
    how: str
    who: str
    reason: str


@dataclass(frozen=True)
class Change:
    """One change of the champion, from version `before` (None: there was none) to `after`."""

    when: str
    how: str
    who: str
    reason: str
    before: str | None
    after: str

    @property
    def key(self) -> str:
        """Its tag: times order the history."""
        return CHANGE + self.when


@dataclass(frozen=True)
class Version:
    """One version of the registered model. `over`: the version it was promoted over, or "base"."""

    number: str
    generation: str
    agents: Agents
    model_id: str
    over: str
    tags: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    created: datetime = field(default=datetime.fromtimestamp(0, UTC), compare=False, repr=False)

    @property
    def title(self) -> str:
        """`version 3 (r2)`"""
        return f"version {self.number} ({self.generation})"

    @property
    def awaiting(self) -> Awaiting | None:
        """What it waits for, if it does: not once it is declined, also if a kill left both tags."""
        waits = self.tags.get(AWAITING)
        return Awaiting(**json.loads(waits)) if waits and self.declined is None else None

    @property
    def declined(self) -> Declined | None:
        """Who took it down or did not want it."""
        no = self.tags.get(DECLINED)
        return Declined(**json.loads(no)) if no else None

    @property
    def accuracy(self) -> dict[str, Any]:
        """Of its test answers, by question set: share, 95% interval and number of questions."""
        return json.loads(self.tags.get("accuracy", "{}"))


class Registry:
    """Versions of one registered model, as they are now. `alias` is that of the champion."""

    def __init__(self, model: str = tracking.REGISTERED_MODEL, alias: str = "champion") -> None:
        self.model, self.alias = model, alias
        self.client = tracking.client()

    def champion(self) -> Version | None:
        """The version the alias points to, or None before the first promotion."""
        return self._by_alias(self.alias)

    def challenger(self) -> Version | None:
        """The candidate that waits for approval, else the last one that did not become champion."""
        return self._by_alias(CHALLENGER)

    def waiting(self) -> Version | None:
        """The candidate that waits for approval."""
        found, champion = self.challenger(), self.champion()
        return found if found and found.awaiting and found != champion else None

    def version(self, number: str) -> Version | None:
        """One version by number, or None if there is none."""
        # Not by get_model_version: a server with users answers "permission denied" for what is not there.
        return next((found for found in self.versions() if found.number == number), None)

    def versions(self) -> list[Version]:
        """Every version, newest first."""
        found = self.client.search_model_versions(f"name = '{self.model}'")
        return sorted(map(_version, found), key=lambda version: -int(version.number))

    def with_agents(self, agents: Agents) -> Version | None:
        """The version of this generation, if it is registered."""
        return next((found for found in self.versions() if found.agents == agents), None)

    def history(self) -> list[Change]:
        """Every change of the champion, oldest first. The last one may not have been carried out: then its
        `after` is not the champion."""
        model = self._unless_missing(lambda: self.client.get_registered_model(self.model))
        tags = model.tags if model else {}
        return [Change(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(CHANGE)]

    def previous(self, champion: Version) -> str | None:
        """The version that was champion before this one came; None if there was none."""
        came = [c for c in self.history() if c.after == champion.number and c.how != "rollback"]
        if came:
            return came[-1].before
        return None if champion.over == BASE else champion.over  # of a store without a history

    def aliases(self) -> dict[str, str]:
        """The version number of each alias that names one."""
        return meant(self.stored_aliases(), self.alias)

    def stored_aliases(self) -> dict[str, str]:
        """The version number of each alias as MLflow has it, also of one that names nobody."""
        model = self._unless_missing(lambda: self.client.get_registered_model(self.model))
        return {name: str(number) for name, number in model.aliases.items()} if model else {}

    def outputs(self, version: Version) -> dict[str, str]:
        """DVC's md5 of the stage output that holds each agent's checkpoint, where the store knows it."""
        experiment, found = tracking.experiment_id(self.client), {}
        for agent, md5 in asdict(version.agents).items():
            made = tracking.models_with(self.client, experiment, md5)
            kept = version.tags.get(f"{agent}_out") or (made[0].tags.get("out_md5") if made else None)
            if kept:
                found[agent] = kept
        return found

    def predictions(self, version: Version) -> list[dict[str, Any]] | None:
        """The answers a version was judged by, or None if they were deleted."""
        import mlflow
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                location = self.client.get_logged_model(version.model_id).artifact_location
                uri = f"{location}/{answers_folder(version.agents)}/{PREDICTIONS}"
                return list(read_jsonl(mlflow.artifacts.download_artifacts(uri, dst_path=folder)))
            except (MlflowException, OSError):
                return None

    def _by_alias(self, alias: str) -> Version | None:
        number = self.aliases().get(alias)
        return self.version(number) if number else None

    def _unless_missing(self, get: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return get()
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def meant(aliases: Mapping[str, str], champion: str) -> dict[str, str]:
    """Without the alias `challenger` where the alias `champion` stands on the same version: it was left there
    when that version became champion."""
    left = aliases.get(CHALLENGER) == aliases.get(champion)
    return {name: number for name, number in aliases.items() if name != CHALLENGER or not left}


def answers_folder(agents: Agents) -> str:
    """Where a reasoning agent's logged model keeps the answers it gave with this summary agent."""
    return f"with-summary-{agents.summary[:12]}"


def text(value: Awaiting | Declined | Change) -> str:
    """As the value of a tag."""
    return json.dumps(asdict(value), ensure_ascii=False)


def _version(found: Any) -> Version:
    tags = dict(found.tags)
    return Version(
        number=str(found.version),
        generation=tags.get("generation", ""),
        agents=Agents(tags.get("checkpoint_md5", ""), tags.get("summary_md5", "")),
        model_id=found.model_id or (found.source or "").removeprefix("models:/"),
        over=tags.get("promoted_over", BASE),
        tags=tags,
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
    )
