"""The MLflow registry: which checkpoint generation is champion, the answers it was judged by, and promotion.

    python -c "from tasks.registry import Registry; print(Registry().champion())"

A promoted generation is a version of one registered model. Its tags hold the md5s of its two checkpoints (DVC
holds the weights) and what it was promoted over; its logged model holds its predictions, for comparisons.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.records import read_jsonl
from tasks import tracking

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Agents:
    """Which generation this is: md5 of the reasoning agent's checkpoint and of the summary agent's."""

    reasoning: str
    summary: str


@dataclass(frozen=True)
class Version:
    """One version of the registered model. `over`: the version it was promoted over, or "base"."""

    number: str
    generation: str
    agents: Agents
    model_id: str
    over: str


class Registry:
    """Versions of one registered model; every change may be repeated without a further effect."""

    def __init__(self, model: str = tracking.REGISTERED_MODEL, alias: str = "champion") -> None:
        self.model, self.alias = model, alias
        self.client = tracking.client()

    def champion(self) -> Version | None:
        """The version the alias points to, or None before the first promotion."""
        return self._unless_missing(lambda: self.client.get_model_version_by_alias(self.model, self.alias))

    def version(self, number: str) -> Version | None:
        """One version by number, or None if it was deleted."""
        return self._unless_missing(lambda: self.client.get_model_version(self.model, number))

    def predictions(self, version: Version) -> list[dict[str, Any]] | None:
        """The answers a version was promoted on, or None if they were deleted."""
        import mlflow
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                location = self.client.get_logged_model(version.model_id).artifact_location
                uri = f"{location}/{_folder(version.agents)}/{PREDICTIONS}"
                return list(read_jsonl(mlflow.artifacts.download_artifacts(uri, dst_path=folder)))
            except (MlflowException, OSError):
                return None

    def promote(self, generation: str, agents: Agents, predictions: Path, over: str) -> Version:
        """Register the generation unless it is, keep its predictions, and point the alias at it."""
        known = next((found for found in self._versions() if found.agents == agents), None)
        model_id = known.model_id if known else self._logged_model(generation, agents.reasoning)
        self.client.log_model_artifact(model_id, str(predictions), _folder(agents))
        if known is None:
            known = self._register(generation, agents, model_id, over)
        elif known.over != over and self.champion() != known:
            self.client.set_model_version_tag(self.model, known.number, "promoted_over", over)
        if self.champion() != known:
            self.client.set_registered_model_alias(self.model, self.alias, known.number)
        return known

    def _register(self, generation: str, agents: Agents, model_id: str, over: str) -> Version:
        import mlflow

        tags = {
            "generation": generation,
            "checkpoint_md5": agents.reasoning,
            "summary_md5": agents.summary,
            "promoted_over": over,
        }
        return _version(mlflow.register_model(f"models:/{model_id}", self.model, tags=tags))

    def _logged_model(self, generation: str, checkpoint_md5: str) -> str:
        """The logged model with these bytes; made now if this store has never seen the checkpoint."""
        import mlflow

        experiment = tracking.experiment_id(self.client)
        found = tracking.models_with(self.client, experiment, checkpoint_md5)
        if found:
            return found[0].model_id
        facts = {"checkpoint_md5": checkpoint_md5, "kind": "reasoning"}
        return mlflow.create_external_model(
            generation, tags=facts, params=facts, model_type="reasoning", experiment_id=experiment
        ).model_id

    def _versions(self) -> list[Version]:
        return [_version(found) for found in self.client.search_model_versions(f"name = '{self.model}'")]

    def _unless_missing(self, get: Any) -> Version | None:
        from mlflow.exceptions import MlflowException

        try:
            return _version(get())
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def _folder(agents: Agents) -> str:
    """Where a reasoning agent's logged model keeps the answers it gave with this summary agent."""
    return f"with-summary-{agents.summary[:12]}"


def _version(found: Any) -> Version:
    tags = found.tags
    return Version(
        number=str(found.version),
        generation=tags.get("generation", ""),
        agents=Agents(tags.get("checkpoint_md5", ""), tags.get("summary_md5", "")),
        model_id=found.model_id or (found.source or "").removeprefix("models:/"),
        over=tags.get("promoted_over", "base"),
    )
