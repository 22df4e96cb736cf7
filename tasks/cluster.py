"""The Ray cluster that a stage samples on: one that is running, or one of its own on this machine.

    with ray_cluster(RayScale(actors=2)) as ray:
        ray.cluster_resources()

Our own listens on loopback only and asks for a token that nobody but the stage knows: whoever reaches a Ray
cluster can run programs on it. It is started and watched like a server (models.engines.process), so that
nothing of it is left, however the stage ends.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.base import EngineError
from models.engines.process import OwnProcess
from tasks.stage import WORK

if TYPE_CHECKING:
    from tasks.engines import RayScale

LONGEST_FOLDER = 30
"""Letters of the temporary folder: Ray's sockets lie deep in it, and their paths may have 107."""
CONNECT_S = 10.0
ADDRESS_FILE = "ray_current_cluster"
"""Written by `ray start` in the temporary folder once the cluster is there."""


@contextmanager
def ray_cluster(scale: RayScale) -> Iterator[Any]:
    """The module `ray`, connected. Raises EngineError when there is no cluster, or ours cannot hold the
    actors."""
    if importlib.util.find_spec("ray") is None:
        raise EngineError("`scale: {ray: …}` needs Ray: pip install 'longview[ray]'")
    address = scale.address or os.environ.get("RAY_ADDRESS") or None
    with ExitStack() as opened:
        own = address is None
        if address is None:
            address = opened.enter_context(_own_cluster(scale))
        quiet = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # else Ray Data's own actors make it warn
        opened.enter_context(_environment(quiet))
        import ray

        try:
            _check_listening(address)
            ray.init(address, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises its own and Python's
            raise EngineError(f"no Ray cluster at {address}: {error}") from error
        opened.callback(ray.shutdown)
        if own:
            _check_room(scale, ray.cluster_resources())
        yield ray


def _check_listening(address: str) -> None:
    """Raises OSError; Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


@contextmanager
def _own_cluster(scale: RayScale) -> Iterator[str]:
    """Its address. Our environment has what connects to it meanwhile."""
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds to loopback, as on those systems
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with ExitStack() as opened:
        opened.enter_context(_environment(settings))
        folder = _short_folder()
        process = OwnProcess("the Ray cluster", WORK / "logs" / "ray.log")
        opened.callback(process.stop)
        process.start(_command(scale, folder), folder=folder)
        file = folder / ADDRESS_FILE
        process.await_ready(lambda: file.exists() and bool(file.read_text().strip()), "start")
        yield file.read_text().strip()


def _command(scale: RayScale, folder: Path) -> list[str]:
    """As many CPUs as the actors ask for: those are a matter of scheduling only."""
    cpus = math.ceil(scale.actors * scale.cpus_per_actor) + 1
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", "--port=0", "--include-dashboard=false", "--no-monitor"),
        *(f"--num-cpus={cpus}", f"--object-store-memory={scale.object_store_mb << 20}"),
        *(f"--temp-dir={folder}", "--disable-usage-stats"),
    ]


def _check_room(scale: RayScale, there: Mapping[str, float]) -> None:
    wanted, gpus = scale.actors * scale.gpus_per_actor, there.get("GPU", 0.0)
    if wanted > gpus:
        raise EngineError(
            f"{scale.actors} actors with gpus_per_actor: {scale.gpus_per_actor:g} need {wanted:g} GPUs, and "
            f"this machine has {gpus:g}: ask for fewer, or name the address of a larger cluster"
        )


def _short_folder() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ray-", dir=parent if len(parent) <= LONGEST_FOLDER else "/tmp"))


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
