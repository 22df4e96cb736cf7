"""GPU slots: stages of several runs never share a device by accident.

    longview deploy --gpus 2        # makes the limits `gpu-0` and `gpu-1`, one slot each
    prefect gcl ls                  # who holds what

A stage holds the slot of every device that it may see (CUDA_VISIBLE_DEVICES, else all) while it runs, so runs
in other checkouts and on other workers of the same server wait for it. Without limits, as on a temporary
server, nothing is held.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from uuid import UUID

from flows.environment import work

PREFIX = "gpu-"
LEASE_S = 60.0
"""A slot is free again this long after its machine died; the least that Prefect allows."""
SERVER_AWAY_S, POLL_S = 600.0, 1.0
NOTE = "gpu-lease"
WITHOUT = frozenset({"instruct", "curate", "compare", "promote", "report"})
"""Stages that neither sample nor train. A stage not named here takes a slot: better wait than share."""


def count() -> int:
    """The GPUs of this machine; 1 without any, because the cores are then the device."""
    import subprocess

    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return max(1, sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))


def names(gpus: int) -> list[str]:
    """The limits of a machine with so many GPUs."""
    return [f"{PREFIX}{index}" for index in range(gpus)]


def seen(limits: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Those of the limits that guard a device which a process with this environment may use."""
    listed = [f"{PREFIX}{part.strip()}" for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    chosen = [name for name in limits if name in listed]
    return chosen if len(chosen) == len(listed) else list(limits)  # not by index: any may be meant


@contextmanager
def held(stage: str, root: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the slots of `stage` for the length of the block, waiting for them as long as it takes.

    Prefect's own `concurrency` does not name its lease; ours is noted in .work, so that the run after one
    that was killed gives it back at once.
    """
    lease = None if stage.partition("@")[0] in WITHOUT else _acquire(stage, root, say)
    if lease is None:
        yield
        return
    done = threading.Event()
    context = copy_context()  # Prefect's settings
    keeper = threading.Thread(target=context.run, args=(_keep, lease, done), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        _release(root, lease)


def _acquire(stage: str, root: Path, say: Callable[[str], None]) -> UUID | None:
    """The lease on the slots, None if there are no limits; a server that restarts is waited for."""
    import httpx
    from prefect.client.orchestration import get_client

    waiting, deadline = False, time.monotonic() + SERVER_AWAY_S
    left = _noted(root)
    if left:  # one run at a time here: who wrote it is gone
        _release(root, left)
    while True:
        try:
            with get_client(sync_client=True) as client:
                limits = client.read_global_concurrency_limits(limit=200)
                wanted = seen(sorted(limit.name for limit in limits if limit.name.startswith(PREFIX)))
                if not wanted:
                    return None
                given = client.increment_concurrency_slots_with_lease(wanted, 1, "concurrency", LEASE_S)
            lease = UUID(given.json()["lease_id"])
            _note(root, lease)
            return lease
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.LOCKED:
                raise
            if not waiting:
                say(f"{stage}: waits for {', '.join(wanted)}, which a stage of another run holds")
            waiting, deadline = True, time.monotonic() + SERVER_AWAY_S
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _note(root: Path, lease: UUID) -> None:
    """Write the lease down whole or not at all: a disk may be full."""
    path = work(NOTE, base=root)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(str(lease), encoding="utf-8")
    part.replace(path)


def _noted(root: Path) -> UUID | None:
    """The lease that was written down. A note that is none is removed: its lease runs out by itself."""
    path = work(NOTE, base=root)
    try:
        return UUID(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None
    except ValueError:
        path.unlink(missing_ok=True)
        return None


def _keep(lease: UUID, done: threading.Event) -> None:
    """Renew the lease until it is no longer needed. A stage goes on though its server is away."""
    import httpx
    from prefect.client.orchestration import get_client

    while not done.wait(LEASE_S / 4):
        with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
            client.renew_concurrency_lease(lease, LEASE_S)


def _release(root: Path, lease: UUID) -> None:
    """Give the slots back; a lease that is unknown is given back already."""
    import httpx
    from prefect.client.orchestration import get_client

    with suppress(httpx.HTTPError):  # the server is away: the lease runs out by itself
        with get_client(sync_client=True) as client:
            client.release_concurrency_slots_with_lease(lease)
        work(NOTE, base=root).unlink(missing_ok=True)
