"""The process that writes a stage's events to MLflow: its run, data sets, metrics, models and artifacts.

    python -m tasks.recorder --fd 3            # started by tasks.tracking.connect for one stage
    python -m tasks.recorder --listen-fd 3     # started by tasks.tracking.shared_recorder for a whole flow

Events are JSON lines: open, metrics, artifact, model, close. `close` is answered with the run's id, a failure
with {"error": ...}. If the socket ends without `close`, the stage was killed: its run is marked KILLED.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks import tracking

ABOUT_NO_ONE = ("judge", "summary", "compare", "report")
"""Stages that read checkpoints and whose metrics are of none of them: of the judge, or of several."""
FIRST_KINDS = ("reasoning", "base")  # whose metrics a stage's are when it reads several checkpoints


class RunRecord:
    """One MLflow run, from its opening event to its close."""

    def __init__(self, client: Any, event: Mapping[str, Any]) -> None:
        self.client, self.stage, self.round = client, event["stage"], event.get("round")
        self.experiment = tracking.experiment_id(client)
        self.parent = event.get("parent")
        self.inputs: dict[str, str] = event["inputs"]
        self.summary: dict[str, float] = {}
        self.models: list[dict[str, Any]] = []
        self.artifacts: list[tuple[str, str | None]] = []
        mark_dead_runs(client, self.experiment, self.stage)
        run = client.create_run(self.experiment, run_name=self.stage, tags=_text(event["tags"]))
        self.id = run.info.run_id
        self._log_params(event["params"])
        self.read_models = self._log_inputs()

    def metrics(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Write the metrics of several events in one call; those without a step are the stage's summary."""
        rows = []
        for event in events:
            rows += [self._metric(key, value, event) for key, value in event["values"].items()]
            if event.get("step") is None:
                self.summary.update(event["values"])
        if rows:
            self.client.log_batch(self.id, metrics=rows)

    def close(self, event: Mapping[str, Any]) -> None:
        """Finish: models and artifacts only of a stage that succeeded."""
        tags = dict(event.get("tags") or {})
        for path, under in self.artifacts + [(path, None) for path in event.get("artifacts", [])]:
            log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
            log(self.id, path, under)
        if event["status"] == "FINISHED":
            made = [self._create_model(model, event.get("out_md5", "")) for model in self.models]
            self._link_metrics(made or self._subject())
            self._summarise_on_parent()
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, str(value)[:5000]) for key, value in tags.items()])
        self.client.set_terminated(self.id, status=event["status"])

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(_key(key), str(value)[:6000]) for key, value in flatten(params).items()]
        if rows:
            self.client.log_batch(self.id, params=rows)

    def _log_inputs(self) -> list[Any]:
        """Every input as a data set with DVC's md5 as digest; checkpoints among them also as input models."""
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

        tag = [InputTag("mlflow.data.context", self.stage)]
        sets = [
            DatasetInput(MetaDataset(dvc_source(path, md5), name=path, digest=md5)._to_mlflow_entity(), tag)
            for path, md5 in self.inputs.items()
        ]
        models = [
            model
            for md5 in self.inputs.values()
            for model in tracking.models_with(self.client, self.experiment, md5)
        ]
        if sets:
            self.client.log_inputs(self.id, sets, [LoggedModelInput(model.model_id) for model in models])
        return models

    def _create_model(self, model: Mapping[str, Any], out_md5: str) -> str:
        """One checkpoint generation: an external logged model, because its weights stay in DVC."""
        import mlflow
        from mlflow.entities import LoggedModelOutput

        facts = {
            "checkpoint": model["checkpoint"],
            "checkpoint_md5": model["md5"],
            "data_version": model["data_version"],
            "parents": ", ".join(model["parents"]),
            "kind": model["kind"],
            **({} if model["round"] is None else {"round": str(model["round"])}),
        }
        made = mlflow.create_external_model(
            name=_model_name(model["name"]),
            source_run_id=self.id,
            tags={**facts, "out_md5": out_md5, "stage": self.stage},
            params=facts,
            model_type=model["kind"],
            experiment_id=self.experiment,
        )
        self.client.log_outputs(self.id, [LoggedModelOutput(made.model_id, step=model["round"] or 0)])
        return made.model_id

    def _subject(self) -> list[str]:
        """The one checkpoint that a stage which trains none (sample, score, evaluate) tells about."""
        if not self.read_models or self.stage.partition("@")[0].startswith(ABOUT_NO_ONE):
            return []

        def rank(model: Any) -> tuple[int, int]:
            kind = model.tags.get("kind", "")
            first = FIRST_KINDS.index(kind) if kind in FIRST_KINDS else len(FIRST_KINDS)
            return int(model.tags.get("round", -1)), -first

        return [max(self.read_models, key=rank).model_id]

    def _link_metrics(self, model_ids: Iterable[str]) -> None:
        name = "data" if "data" in self.inputs else next(iter(self.inputs), None)
        digest = self.inputs[name] if name else None
        event = {"time_ms": _now_ms(), "dataset_name": name, "dataset_digest": digest}
        for model_id in model_ids:
            rows = [self._metric(k, v, {**event, "model_id": model_id}) for k, v in self.summary.items()]
            if rows:
                self.client.log_batch(self.id, metrics=rows)

    def _summarise_on_parent(self) -> None:
        """What a round came to, on the flow's own run with the round as step."""
        if not self.parent or self.round is None:
            return
        stage = self.stage.partition("@")[0]
        event = {"time_ms": _now_ms(), "step": self.round}
        rows = [self._metric(f"{stage}/{key}", value, event) for key, value in self.summary.items()]
        if rows:
            self.client.log_batch(self.parent, metrics=rows)

    def _metric(self, key: str, value: float, event: Mapping[str, Any]) -> Any:
        from mlflow.entities import Metric

        links = {
            name: event[name] for name in ("model_id", "dataset_name", "dataset_digest") if name in event
        }
        return Metric(_key(key), float(value), event["time_ms"], int(event.get("step") or 0), **links)


def dvc_source(path: str, md5: str) -> Any:
    """An MLflow data set source that says: this path at this DVC md5."""
    from mlflow.data.dataset_source import DatasetSource

    class DvcSource(DatasetSource):
        """A path of the checkout at one version; `dvc checkout` brings it back."""

        def __init__(self, path: str, md5: str) -> None:
            self.path, self.md5 = path, md5

        @staticmethod
        def _get_source_type() -> str:
            return "dvc"

        def load(self) -> str:
            return self.path

        @staticmethod
        def _can_resolve(raw_source: Any) -> bool:
            return False

        @classmethod
        def _resolve(cls, raw_source: Any) -> DvcSource:
            raise NotImplementedError("a DVC source is made from a path and its md5")

        def to_dict(self) -> dict[str, str]:
            return {"path": self.path, "md5": self.md5}

        @classmethod
        def from_dict(cls, source_dict: dict[Any, Any]) -> DvcSource:
            return cls(source_dict["path"], source_dict["md5"])

    return DvcSource(path, md5)


def mark_dead_runs(client: Any, experiment: str, stage: str) -> None:
    """Runs of this stage that still say RUNNING though their process on this host is gone were killed."""
    where = f"attributes.status = 'RUNNING' and tags.`longview.stage` = '{stage}'"
    for run in client.search_runs([experiment], where):
        tags = run.data.tags
        if tags.get("longview.host") == socket.gethostname() and not _alive(int(tags.get("longview.pid", 0))):
            client.set_terminated(run.info.run_id, status="KILLED")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value})
    return flat


def serve(connection: socket.socket) -> None:
    """Record one stage from its socket, answering its close or the first failure."""
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(connection, events), daemon=True).start()
    try:
        run_id = _record(events)
        answer: dict[str, Any] = {"run_id": run_id}
    except Exception as error:  # whatever MLflow raises, the stage must hear of it and stop
        answer = {"error": f"{type(error).__name__}: {error}"}
    try:
        connection.sendall(json.dumps(answer).encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the stage is gone; its run is marked
    finally:
        connection.close()


def _record(events: queue.Queue) -> str | None:
    first = events.get()
    if first is None:
        return None
    record = RunRecord(tracking.client(), first)
    while True:
        batch = _take(events)
        record.metrics(event for event in batch if event and event["op"] == "metrics")
        for event in batch:
            if event is None or event["op"] == "close":
                record.close(event or {"status": "KILLED"})
                return record.id
            if event["op"] == "artifact":
                record.artifacts.append((event["path"], event.get("under")))
            elif event["op"] == "model":
                record.models.append(event)


def _take(events: queue.Queue) -> list[dict[str, Any] | None]:
    """At least one event, and all that have arrived meanwhile: SQLite takes a batch as fast as one."""
    batch = [events.get()]
    while not events.empty() and batch[-1] is not None:
        batch.append(events.get())
    return batch


def _read(connection: socket.socket, events: queue.Queue) -> None:
    try:
        with connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                events.put(json.loads(line))
    except (OSError, ValueError):
        pass
    events.put(None)


def _listen(listener: socket.socket) -> None:
    """Serve stages until the flow that started this process is gone (its end of stdin closes)."""
    threading.Thread(target=tracking.client, daemon=True).start()
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            thread = threading.Thread(target=serve, args=(connection,))
            thread.start()
            threads.append(thread)

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    for thread in threads:
        thread.join()


def _text(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items() if value is not None}


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)


def _model_name(name: str) -> str:
    return re.sub(r"[/:.%\"']", "_", name)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def main() -> None:
    """Serve a descriptor. Signals are the stage's business: its end is seen on the socket."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fd", type=int)
    parser.add_argument("--listen-fd", type=int)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if arguments.listen_fd is not None:
        _listen(socket.socket(fileno=arguments.listen_fd))
    else:
        serve(socket.socket(fileno=arguments.fd))
    os._exit(0)  # everything is written; MLflow's own exit hooks take seconds


if __name__ == "__main__":
    main()
