"""vLLM for a role: a server, lingering or not, or a worker of the stage's own; with the weights that were
trained.

    with served("reasoner", e, "artifacts/rounds/r1/dpo/checkpoint", Path("data"), swaps=Counter()) as engine:
        ...

With `linger_s` a server goes on after its stage. The next stage that wants the same one takes it over and, if
its weights are others, has it reload them. Where a checkpoint has a probe (models.probe), what is served is
compared with it before a stage begins and after each reload.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.engines.base import EngineError
from models.engines.openai import ClientSettings, OpenAIEngine
from models.engines.vllm import VLLMEngine, WorkerSettings, worker_command
from tasks.fingerprint import fingerprint
from tasks.stage import WORK

if TYPE_CHECKING:
    from models.engines.weights import Probing, Weights
    from models.images import ImageSource
    from tasks.engines import EngineParams

SERVERS = WORK / "servers"
"""Where lingering servers are remembered."""
PROBE_PATIENCE_S = 10.0


@contextmanager
def served(
    name: str, e: EngineParams, model: str, images: ImageSource | Path, swaps: Counter[str]
) -> Iterator[OpenAIEngine]:
    """An engine that asks a server: the one at `e.url`, or one of ours. name: of its log and
    in messages. swaps: counts `reloads` and `restarts` of a server that lingers. Raises EngineError."""
    from models.engines.server import Server, ServerSettings, await_running, vllm_command
    from models.engines.weights import adapter_arguments, served_weights

    client = ClientSettings(
        api_key_env=e.api_key_env, timeout_s=e.timeout_s, patience_s=e.patience_s, seeded=e.seeded
    )
    if e.url is not None:
        await_running(e.url, e.patience_s)
        yield OpenAIEngine(e.url, model, images, e.capacity, client)
        return
    weights = served_weights(model, fingerprint)
    probing = _probing(name, e, weights)
    adapter = weights.adapter
    named = ["--lora-modules", f"{adapter.name}={adapter.path}"] if adapter and not e.linger_s else []
    settings = ServerSettings(
        weights.model,
        log=WORK / "logs" / f"server-{name}.log",
        command=vllm_command(e.interpreter),
        arguments=[*e.arguments, *adapter_arguments(adapter, e.arguments), *named],
        environment=e.filled_environment,
    )
    if e.linger_s:
        from models.engines.lingering import Borrower

        swaps.update(reloads=0, restarts=0)
        borrower = Borrower(settings, weights, probing, _connect, e.linger_s, SERVERS, swaps)
        with borrower.borrow() as server:
            yield OpenAIEngine(server.url, server.model, images, e.capacity, client, server.revive)
        return
    served_name = adapter.name if adapter else weights.model
    with Server(settings) as own:
        probing.check(_connect(own.url, served_name))
        yield OpenAIEngine(own.url, served_name, images, e.capacity, client, own.revive)


@contextmanager
def in_worker(name: str, e: EngineParams, model: str, images: ImageSource | Path) -> Iterator[VLLMEngine]:
    """vLLM's engine in a process of the stage's own. Raises EngineError."""
    from models.engines.weights import adapter_arguments, served_weights

    weights = served_weights(model, fingerprint)
    adapter = weights.adapter
    named = ["--adapter", f"{adapter.name}={adapter.path}"] if adapter else []
    settings = WorkerSettings(
        log=WORK / "logs" / f"vllm-{name}.log",
        command=worker_command(e.interpreter),
        arguments=[*e.arguments, *adapter_arguments(adapter, e.arguments), *named],
        environment=e.filled_environment,
        silence_s=e.timeout_s,
        seeded=e.seeded,
    )
    with VLLMEngine(weights.model, images, e.capacity, settings) as engine:
        _probing(name, e, weights).check(engine)
        yield engine


def stop_lingering(folder: Path) -> int:
    """End the servers that wait for another stage; returns how many there were."""
    from models.engines.keeper import stop_all

    return stop_all(folder)


def _connect(url: str, name: str) -> OpenAIEngine:
    """To compare log-probs."""
    return OpenAIEngine(url, name, settings=ClientSettings(patience_s=PROBE_PATIENCE_S))


def _probing(name: str, e: EngineParams, weights: Weights) -> Probing:
    """With the probe of the checkpoint; says so if there is none."""
    from models.engines.weights import Probing, default_tolerance
    from models.probe import read_probe

    try:
        probe = read_probe(weights.folder)
    except ValueError as error:
        raise EngineError(str(error)) from None
    if probe is None:
        print(f"{name}: {weights.folder} has no probe of its training: served as it is", file=sys.stderr)
    return Probing(probe, e.probe_tolerance or default_tolerance(e.arguments))
