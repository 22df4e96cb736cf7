"""The MLflow run of a whole flow run: the parent of the runs that its stages open.

    python -m flows.retrain        # opens one when the first stage has something to do

A run in which nothing is stale opens none. A run that continues after a kill continues its parent run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.environment import work


class ParentRun:
    """Opened on the first `id()`; `close` ends it."""

    def __init__(self, root: Path, tags: Mapping[str, str]) -> None:
        self._root, self._tags = root, dict(tags)
        self._client: Any = None
        self._id: str | None = None

    def id(self) -> str | None:
        """The run's id, opened now if it is not yet; None when tracking is off."""
        from tasks import tracking

        if self._id is None and tracking.enabled():
            self._client = tracking.client()
            self._id = self._continue(read_note(self._root).get("parent_run_id")) or self._open()
            write_note(self._root, parent_run_id=self._id)
        return self._id

    @property
    def opened(self) -> str | None:
        """The id if the run was opened, without opening it."""
        return self._id

    def close(self, status: str) -> None:
        """FINISHED, FAILED or KILLED. A run that failed because MLflow is away is left to the next one."""
        from tasks import tracking

        if self._id and not (status != "FINISHED" and tracking.away(tracking.tracking_uri())):
            self._client.set_terminated(self._id, status=status)
            if status == "FINISHED":
                write_note(self._root, parent_run_id=None)

    def _open(self) -> str:
        from tasks import tracking

        run = self._client.create_run(
            tracking.experiment_id(self._client), run_name="retrain", tags=self._tags
        )
        return str(run.info.run_id)

    def _continue(self, run_id: str | None) -> str | None:
        """An unfinished parent run of the same parameters is taken up again."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException:
            return None
        same = all(run.data.tags.get(key) == value for key, value in self._tags.items())
        if not same:
            if run.info.status == "RUNNING":
                self._client.set_terminated(run_id, status="KILLED")
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run_id


@contextmanager
def parent_run(root: Path, profile: str) -> Iterator[ParentRun]:
    """The flow's MLflow run for the length of the block, opened once a stage needs it."""
    digest = hashlib.md5((root / "params.yaml").read_bytes(), usedforsecurity=False).hexdigest()
    run = ParentRun(root, {"longview.kind": "flow", "longview.profile": profile, "longview.params": digest})
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:  # Ctrl-C, cancelled, told to stop
        status = "KILLED"
        raise
    finally:
        run.close(status)


def read_note(root: Path) -> dict[str, Any]:
    """What the last run of this checkout left for the next: its Prefect and MLflow run ids, the parameters
    `asked` for until it succeeds, and `unfinished` if not all that it made was pushed and published."""
    try:
        return json.loads(work("run.json", base=root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_note(root: Path, **values: Any) -> None:
    """Change values of the note; None drops one."""
    path = work("run.json", base=root)
    note = {k: v for k, v in {**read_note(root), **values}.items() if v is not None}
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(note), encoding="utf-8")
    part.replace(path)
