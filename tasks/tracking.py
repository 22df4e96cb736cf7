"""How stages and flows reach MLflow: which store, and a recorder process that keeps MLflow out of stages.

    python -c "from tasks.tracking import find_producer; print(find_producer('artifacts/judge'))"

Importing MLflow takes seconds and 170 MB, and talking to SQLite milliseconds a call. A stage therefore starts
`python -m tasks.recorder` beside itself and writes events to it as JSON lines over a socket; nothing here
imports MLflow until `client()` is called. The recorder sees when a stage is killed, and marks its run so.
`shared_recorder()` keeps one recorder for all stages a flow starts.

A server that does not answer when a run begins stops it at once. One that goes away later is waited for: the
stage works on, and the recorder keeps its events in memory until they are sent (PATIENCE_S).

Environment: MLFLOW_TRACKING_URI (default: the local store below), LONGVIEW_PARENT_RUN_ID (the flow's run),
LONGVIEW_TRACKING=off (record nothing).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STORE = Path(".work/mlflow")
EXPERIMENT = "longview"
REGISTERED_MODEL = "longview"
REACH_TIMEOUT_S = 3.0
PATIENCE_S = 720.0
"""How long a server that has answered before is waited for."""
RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "10", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "4"}
"""MLflow's own, of each request: 0 + 8 + 16 + 32 + 64 + 5 × 120 s are PATIENCE_S."""
ANSWER_TIMEOUT_S = 2 * PATIENCE_S
LEAVE_S = 10.0
REACHED = "LONGVIEW_TRACKING_REACHED"
"""In the environment of this process and those it starts: the server that has answered."""
HINT = "Start it (`longview up`), correct MLFLOW_TRACKING_URI, or record nothing: LONGVIEW_TRACKING=off."


class TrackingError(RuntimeError):
    """MLflow could not record the run; the message says what to do."""


def enabled() -> bool:
    """False when LONGVIEW_TRACKING=off."""
    return os.environ.get("LONGVIEW_TRACKING", "on").lower() not in ("off", "0", "false")


def tracking_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or SQLite below .work/mlflow of this checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(STORE / 'mlflow.db').resolve()}"


def check_reachable(uri: str) -> None:
    """Fail within seconds, before any work is done, if a tracking server does not answer.

    One that has answered before, to this process or to the one that started it, is waited for.
    """
    patience_s = PATIENCE_S if os.environ.get(REACHED) == uri else 0.0
    began, told = time.monotonic(), False
    while problem := away(uri):
        if time.monotonic() - began >= patience_s:
            waited = f" for {patience_s / 60:.0f} minutes" if patience_s else ""
            raise TrackingError(f"{problem}{waited}. {HINT}")
        if not told:
            print(f"{problem}: waiting up to {patience_s / 60:.0f} minutes", file=sys.stderr, flush=True)
            told = True
        time.sleep(1)
    os.environ[REACHED] = uri


def away(uri: str) -> str | None:
    """What is wrong if `uri` is a server that does not answer now."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        return f"MLflow at {address.hostname}:{port} does not answer ({error})"
    return None


def client() -> Any:
    """An MlflowClient of a store that is migrated and has the experiment (imports MLflow: seconds)."""
    uri = tracking_uri()
    check_reachable(uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, value in RETRIES.items():
        os.environ.setdefault(name, value)
    import mlflow

    mlflow.set_tracking_uri(uri)
    with _alone(uri):
        found = mlflow.MlflowClient(tracking_uri=uri)
        if found.get_experiment_by_name(EXPERIMENT) is None:
            _create_experiment(found, uri)
    return found


def experiment_id(found: Any) -> str:
    """The id of the experiment that holds every run."""
    return found.get_experiment_by_name(EXPERIMENT).experiment_id


def find_producer(path: str | Path, md5: str | None = None, found: Any = None) -> Any:
    """The newest MLflow run that made these bytes at `path` (also when DVC restored them), or None.

    A stage that DVC restores from its cache runs no code; its output leads here to the run that made it.
    """
    from tasks.fingerprint import fingerprint

    found = found or client()
    key = Path(os.path.relpath(path)).as_posix()
    where = f"tags.`longview.out.{key}` = '{md5 or fingerprint(path)}'"
    runs = found.search_runs(
        [experiment_id(found)], where, order_by=["attributes.start_time DESC"], max_results=1
    )
    return runs[0] if runs else None


def models_with(client: Any, experiment: str, md5: str) -> list[Any]:
    """The newest logged model of each name whose checkpoint, or the stage output around it, has this md5."""
    newest: dict[str, Any] = {}
    for tag in ("checkpoint_md5", "out_md5"):
        order = [{"field_name": "creation_timestamp", "ascending": False}]
        for model in client.search_logged_models([experiment], f"tags.{tag} = '{md5}'", order_by=order):
            newest.setdefault(model.name, model)
    return list(newest.values())


class Recorder:
    """The stage's end of the socket: sends events, raises TrackingError once the other end reports one."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen | None = None) -> None:
        self._connection, self._process = connection, process
        self._buffer = b""

    def send(self, op: str, **event: Any) -> None:
        """Queue one event; returns at once."""
        self._raise_if_failed()
        try:
            self._connection.sendall(json.dumps({"op": op, **event}).encode() + b"\n")
        except OSError as error:
            self._raise_if_failed()
            raise TrackingError(f"the MLflow recorder is gone ({error}). {HINT}") from error

    def close(self, status: str, **event: Any) -> str:
        """End the run and wait until MLflow has it all; returns the run's id."""
        self.send("close", status=status, **event)
        self._connection.settimeout(ANSWER_TIMEOUT_S)
        try:
            answer = self._answer()
        except TimeoutError as error:
            raise TrackingError(f"MLflow did not answer within {ANSWER_TIMEOUT_S:.0f} s. {HINT}") from error
        self._connection.close()
        if self._process:
            self._process.wait(timeout=30)
        return answer["run_id"]

    def _raise_if_failed(self) -> None:
        if self._connection.fileno() < 0:
            raise TrackingError(f"the MLflow recorder has ended. {HINT}")
        if select.select([self._connection], [], [], 0)[0]:
            self._answer()

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._connection.recv(65536)
            if not data:
                raise TrackingError(f"the MLflow recorder ended without an answer. {HINT}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            self._connection.close()
            raise TrackingError(f"MLflow at {tracking_uri()} refused the record: {answer['error']}. {HINT}")
        return answer


def connect() -> Recorder:
    """The flow's shared recorder if there is one, else a recorder of this stage's own."""
    check_reachable(tracking_uri())
    shared = os.environ.get("LONGVIEW_RECORDER")
    if shared:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(shared)
            return Recorder(connection)
        except OSError:
            connection.close()
    ours, theirs = socket.socketpair()
    with theirs:
        return Recorder(ours, _start("--fd", theirs, stdin=subprocess.DEVNULL))


@contextmanager
def shared_recorder() -> Iterator[None]:
    """One recorder for every stage started inside: each stage is spared the import of MLflow."""
    if not enabled():
        yield
        return
    check_reachable(tracking_uri())
    with tempfile.TemporaryDirectory(prefix="longview-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder) / "recorder")
        listener.bind(address)
        listener.listen()
        process = _start("--listen-fd", listener, stdin=subprocess.PIPE)
        previous = os.environ.get("LONGVIEW_RECORDER")
        os.environ["LONGVIEW_RECORDER"] = address
        try:
            yield
        finally:
            os.environ.pop("LONGVIEW_RECORDER")
            if previous:
                os.environ["LONGVIEW_RECORDER"] = previous
            if process.stdin:
                process.stdin.close()
            try:
                process.wait(timeout=LEAVE_S)
            except subprocess.TimeoutExpired:  # MLflow is away; a run left open is marked by the next one
                process.kill()
                process.wait()


def _start(flag: str, end: socket.socket, stdin: int) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tasks.recorder", flag, str(end.fileno())]
    return subprocess.Popen(
        command, pass_fds=[end.fileno()], stdin=stdin, stdout=subprocess.DEVNULL, env=environment
    )


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold the store's lock: the first use of a SQLite store migrates it, and two at once would collide."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    folder = Path(uri.removeprefix("sqlite:///")).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create_experiment(found: Any, uri: str) -> None:
    from mlflow.exceptions import MlflowException

    local = uri.startswith("sqlite:///")
    location = (
        (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri() if local else None
    )
    try:
        found.create_experiment(EXPERIMENT, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
