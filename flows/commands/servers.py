"""`longview up` and `longview down`: the Prefect and MLflow servers of this checkout, on loopback.

`down` also ends vLLM servers that wait for another stage (`linger_s`, docs/engines.md).

longview up
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from flows.environment import process_started, root, server_url, servers, work

HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Server:
    """How one server is started and asked for its health."""

    name: str
    port: int  # if it is free, else any
    health: str


PREFECT, MLFLOW = Server("prefect", 4200, "/api/health"), Server("mlflow", 5000, "/health")


def up() -> None:
    """Start the Prefect and MLflow servers of this checkout in the background; print their addresses.

    They listen on this machine only. Running it again changes nothing. Logs: .work/logs/.

    Example:

        longview up
    """
    base = root()
    started = {s.name: _start(s, base) for s in (PREFECT, MLFLOW) if not server_url(s.name, base)}
    for server in (PREFECT, MLFLOW):
        if server.name in started:
            _await(server, started[server.name], base)
        typer.echo(f"{server.name:8} {server_url(server.name, base)}")
    typer.echo(f"for Prefect's own commands: export PREFECT_API_URL={server_url(PREFECT.name, base)}/api")


def down() -> None:
    """Stop the servers that `longview up` started, and vLLM servers that wait for another stage.

    Running it again changes nothing.

    Example:

        longview down
    """
    base = root()
    entries = servers(base)
    for name, entry in entries.items():
        alive = process_started(int(str(entry["pid"]))) == entry["started"]
        if alive:
            _end(int(str(entry["pid"])))
        typer.echo(f"{name:8} {'stopped' if alive else 'was not running'}")
    lingering = _stop_lingering(base)
    if lingering:
        typer.echo(f"vllm     {lingering} stopped")
    if not entries and not lingering:
        typer.echo("no servers of this checkout are running")
    work("servers.json", base=base).unlink(missing_ok=True)


def _stop_lingering(base: Path) -> int:
    from tasks.served import SERVERS, stop_lingering

    return stop_lingering(base / SERVERS) if (base / SERVERS).is_dir() else 0


def command(server: Server, port: int, base: Path) -> list[str]:
    """The command line of a server."""
    listen = ["--host", HOST, "--port", str(port)]
    if server is PREFECT:
        return [sys.executable, "-m", "prefect", "server", "start", *listen]
    from tasks.tracking import STORE

    store = base / STORE
    return [
        *[sys.executable, "-m", "mlflow", "server", *listen, "--workers", "1"],
        *["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"],
        *["--default-artifact-root", (store / "artifacts").as_uri()],
    ]


def _start(server: Server, base: Path) -> subprocess.Popen[bytes]:
    port = _free_port(server.port)
    log = work("logs", f"{server.name}-server.log", base=base)
    log.parent.mkdir(parents=True, exist_ok=True)
    if server is MLFLOW:
        _migrate(base)
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    url = f"http://{HOST}:{port}"
    environment |= {"PREFECT_UI_API_URL": f"{url}/api"} if server is PREFECT else {}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(server, port, base),
            cwd=base,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it stays when the terminal closes
        )
    _remember(base, server.name, {"pid": process.pid, "started": process_started(process.pid), "url": url})
    return process


def _migrate(base: Path) -> None:
    """Make the MLflow store and its experiment once, before two processes do it at the same time."""
    code = "from tasks import tracking; tracking.client()"
    subprocess.run([sys.executable, "-c", code], cwd=base, check=True, capture_output=True)


def _await(server: Server, process: subprocess.Popen[bytes], base: Path) -> None:
    import urllib.request

    url = f"{servers(base)[server.name]['url']}{server.health}"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    typer.echo(f"{server.name} did not start; its log: .work/logs/{server.name}-server.log", err=True)
    raise typer.Exit(1)


def _remember(base: Path, name: str, entry: dict[str, Any]) -> None:
    path = work("servers.json", base=base)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({**servers(base), name: entry}), encoding="utf-8")
    part.replace(path)


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError("no free port on loopback")


def _end(pid: int) -> None:
    import psutil

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    for member in psutil.wait_procs(family, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
