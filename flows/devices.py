"""GPU slots: stages of several runs never share a device by accident.

    longview deploy --gpus 2        # makes the limits `gpu-0` and `gpu-1`, one slot each
    prefect gcl ls                  # who holds what

A stage holds the slot of every device that it may see (CUDA_VISIBLE_DEVICES, else all) while it runs, so runs
in other checkouts and on other workers of the same server wait for it. Without limits, as on a temporary
server, nothing is held.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

PREFIX = "gpu-"
LEASE_S = 60.0
"""A slot is free again this long after its holder was killed; the least that Prefect allows."""
SERVER_AWAY_S = 600.0
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
def held(stage: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the slots of `stage` for the length of the block, waiting for them as long as it takes."""
    import httpx

    with ExitStack() as stack:
        if stage.partition("@")[0] not in WITHOUT:
            _acquire(stack, stage, say)
        try:
            yield
        finally:
            with suppress(httpx.HTTPError):  # the server is away: the lease runs out by itself
                stack.close()


def _acquire(stack: ExitStack, stage: str, say: Callable[[str], None]) -> None:
    """Take the slots; a server that restarts is waited for."""
    import httpx
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    deadline = time.monotonic() + SERVER_AWAY_S
    while True:
        try:
            limits = _limits()
            wanted = seen([limit.name for limit in limits])
            if not wanted:
                return
            if any(limit.active_slots >= limit.limit for limit in limits if limit.name in wanted):
                say(f"{stage}: waits for {', '.join(wanted)}, which a stage of another run holds")
            slots = concurrency(
                wanted, strict=True, lease_duration=LEASE_S, raise_on_lease_renewal_failure=False
            )
            stack.enter_context(slots)
            return
        except (httpx.TransportError, ConcurrencySlotAcquisitionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


def _limits() -> list[Any]:
    """The GPU limits of the server in use."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_global_concurrency_limits(limit=200)
    return sorted((limit for limit in found if limit.name.startswith(PREFIX)), key=lambda limit: limit.name)
