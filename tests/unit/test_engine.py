"""The process of a worker's run, before it can ask Prefect's server anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from uuid import uuid4

import httpx
import pytest


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a server that answers everything with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()
    thread.join()


def flow_name(status: int, monkeypatch: pytest.MonkeyPatch) -> str | None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import engine

    monkeypatch.setenv(engine.RUN, str(uuid4()))
    with answering(status) as url, temporary_settings({PREFECT_API_URL: url}):
        return engine.flow_name()


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_proxy_before_a_server_that_restarts_is_no_answer(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flow_name(status, monkeypatch) is None


def test_a_refusal_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        flow_name(401, monkeypatch)
