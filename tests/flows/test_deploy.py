"""Deployments, data-watch, triggers and notifications: a real Prefect server, real DVC, a real webhook."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.mini import REPOSITORY

pytestmark = pytest.mark.flows


@pytest.fixture
def deployed(project: Path, prefect_server: str) -> Path:
    """A miniature project with the deployments of this one."""
    shutil.copy(REPOSITORY / "prefect.yaml", project / "prefect.yaml")
    shutil.copytree(REPOSITORY / "deploy", project / "deploy")
    return project


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook on this machine, and what it has received."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", received
    server.shutdown()


def wait_for(what: Callable[[], Any], timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("timed out waiting")


def lines(root: Path, **options: Any) -> dict[str, str]:
    from flows.deploy import Options, deploy

    return dict(deploy(root, Options(gpus=2, **options)).lines)


def test_deploying_twice_changes_nothing(deployed: Path) -> None:
    first = lines(deployed, cron="0 3 * * *", notify="http://127.0.0.1:9/hook")
    assert first["retrain/retrain"] in ("created", "changed"), first
    again = lines(deployed, notify="http://127.0.0.1:9/hook")
    assert set(again.values()) == {"unchanged"}, again
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        retrain = client.read_deployment_by_name("retrain/retrain")
        print(retrain.model_dump_json(indent=1))
