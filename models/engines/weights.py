"""Which weights an engine serves, whether they are those that were trained, and how a server gets others.

    weights = served_weights("artifacts/rounds/r1/dpo/checkpoint", fingerprint)
    probing = Probing(read_probe(weights.folder), tolerance=0.02)
    probing.check(engine)                      # EngineError if it serves others
    swap(url, before=weights, after=others, method=RELOAD)

Serving other weights than the trained ones is an error that nothing else shows: the engine answers all the
same. So its log-probs of the tokens in the checkpoint's probe.json are compared with the trainer's. On CPU in
float32 they differ by 0.0001 a token in the mean; a stale output layer, as vLLM's own reload leaves it there,
by 0.17.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from models.adapter_base import ADAPTER_CONFIG, BaseChangedError, base_of
from models.engines.base import Engine, EngineError, Failure, Request, Sampling, Scored
from models.probe import Probe

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
EXTENSION = "longview_reload.Reload"
EXTENSION_FOLDER = Path(__file__).with_name("worker_extension")
RELOAD, PLAIN_RELOAD = "longview_reload", "reload_weights"
"""Methods of vLLM's worker: EXTENSION's, and its own."""
TOLERANCE_FLOAT32, TOLERANCE = 0.02, 0.1
"""Mean difference a token in nats that rounding may cause: in float32, and in half precision."""
SWAP_TIMEOUT_S = 600.0
HELD_S = 10.0
"""How long blocks of the prefix cache may be held by requests that were given up."""


class Disagreement(EngineError):
    """The engine does not serve the weights that were trained."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. name: what requests call it; new for new weights, so that no prefix cache takes them
    for the old ones. rank: vLLM's --max-lora-rank for it."""

    name: str
    path: str
    rank: int


@dataclass(frozen=True)
class Weights:
    """What an engine is to serve. model: a folder or a hub id, the base where there is an adapter; version:
    its fingerprint. folder: the checkpoint that was asked for."""

    model: str
    version: str
    adapter: Adapter | None = None

    @property
    def folder(self) -> Path:
        """Where the probe lies."""
        return Path(self.adapter.path if self.adapter else self.model)

    def same(self, other: Weights) -> bool:
        """Wherever they lie."""
        names = [weights.adapter and weights.adapter.name for weights in (self, other)]
        return self.version == other.version and names[0] == names[1]


def served_weights(checkpoint: str, fingerprint: Callable[[str], str]) -> Weights:
    """The weights of a checkpoint folder, a folder with a LoRA adapter as peft writes it, or a hub id.

    Raises EngineError for an adapter that names no base, one that is not there, or other weights than those
    it was trained on."""
    config = Path(checkpoint) / ADAPTER_CONFIG
    if not config.is_file():
        return Weights(checkpoint, fingerprint(checkpoint) if Path(checkpoint).exists() else checkpoint)
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        base, rank = str(settings["base_model_name_or_path"] or ""), int(settings["r"])
        rank = next(allowed for allowed in RANKS if allowed >= rank)
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise EngineError(f"{config} is no LoRA adapter that vLLM can serve: {error!r}") from None
    if not base or (base.startswith(("/", ".", "artifacts/")) and not Path(base).is_dir()):
        raise EngineError(
            f"{config} names {base!r} as its base model (base_model_name_or_path), and there is none: make "
            "it again with `dvc repro` or `dvc pull`, or correct the name"
        )
    try:
        base_of(checkpoint)
    except BaseChangedError as error:
        raise EngineError(str(error)) from None
    adapter = Adapter(f"adapter-{fingerprint(checkpoint)[:12]}", str(Path(checkpoint).resolve()), rank)
    return Weights(base, fingerprint(base) if Path(base).exists() else base, adapter)


def adapter_arguments(adapter: Adapter | None, arguments: Sequence[str]) -> list[str]:
    """What vLLM must be told to serve an adapter, unless `arguments` tell it."""
    if adapter is None or "--enable-lora" in arguments:
        return []
    rank = [] if "--max-lora-rank" in arguments else ["--max-lora-rank", str(adapter.rank)]
    return ["--enable-lora", *rank]


def default_tolerance(arguments: Sequence[str]) -> float:
    """By the --dtype among vLLM's arguments."""
    text = " ".join(arguments).replace("=", " ")
    return TOLERANCE_FLOAT32 if "--dtype float32" in text else TOLERANCE


@dataclass(frozen=True)
class Probing:
    """Comparing an engine with a probe. tolerance: mean difference a token, in nats."""

    probe: Probe | None
    tolerance: float

    def distance(self, engine: Engine) -> float:
        """Mean absolute difference of the log-probs. Raises EngineError if the engine does not say them, and
        Disagreement if it reads other tokens."""
        probe = self.probe
        assert probe is not None
        pairs = asyncio.run(_scored(engine, probe))
        said = list(pairs)[-len(probe.tokens) :]
        if [token for token, _ in said] != probe.tokens:
            raise Disagreement(
                "the engine turns the probe's prompt into other tokens than the trainer: tokenizer, chat "
                "template or processor are not those of the checkpoint"
            )
        differences = [abs(a - b) for (_, a), b in zip(said, probe.log_probs, strict=True)]
        return sum(differences) / len(differences)

    def agrees(self, distance: float) -> bool:
        """Whether it is rounding."""
        return distance <= self.tolerance  # false for what is no number

    def check(self, engine: Engine) -> None:
        """Raises Disagreement with figures if the engine does not serve the weights of the probe."""
        if self.probe is not None and not self.agrees(distance := self.distance(engine)):
            raise self.disagreement(distance)

    def disagreement(self, distance: float) -> Disagreement:
        """With figures, and what to do."""
        return Disagreement(
            "the engine does not serve the weights that were trained: its log-probs differ from "
            f"the trainer's by {distance:.4f} a token on average, {self.tolerance:g} allowed. See whether "
            "its arguments change the model (--quantization, --hf-overrides, --dtype) and whether its "
            "vLLM knows this architecture; if they are meant to, raise probe_tolerance"
        )


async def _scored(engine: Engine, probe: Probe) -> Sequence[tuple[int, float]]:
    request = Request("probe", probe.prompt, Sampling(max_new_tokens=1), log_probs=True)
    try:
        reply = await engine.ask(request)
    finally:
        await engine.close()
    if isinstance(reply, Failure):
        raise EngineError(f"the engine gave up on the probe: {reply.reason} ({reply.detail})")
    if not isinstance(reply, Scored):
        raise EngineError("the engine says no log-probs of the prompt: is it vLLM 0.32?")
    return reply.prompt_log_probs


def swap(url: str, before: Weights, after: Weights, method: str) -> None:
    """Give a server of vLLM in development mode other weights of the same architecture, and forget what it
    computed with the old ones. No request may be under way but those of clients that are gone.

    Raises EngineError; the server is then good for nothing.
    """
    base = url.removesuffix("/v1")
    reload = before.version != after.version
    if reload:
        post(base, "/pause?mode=abort")
        path = str(Path(after.model).resolve())
        post(base, "/collective_rpc", {"method": method, "kwargs": {"weights_path": path}})
        # The reload emptied the workers' encoder caches: a scheduler that is not told counts on what was
        # there, and the engine dies of the first picture that it has met before.
        post(base, "/reset_encoder_cache")
        post(base, "/reset_mm_cache")
        _forget_prefixes(base)
        post(base, "/resume")
    if reload or before.adapter != after.adapter:
        for path, adapter in (
            ("/v1/unload_lora_adapter", before.adapter),
            ("/v1/load_lora_adapter", after.adapter),
        ):
            if adapter is not None:
                post(base, path, {"lora_name": adapter.name, "lora_path": adapter.path})


def _forget_prefixes(base: str) -> None:
    deadline = time.monotonic() + HELD_S
    while not json.loads(post(base, "/reset_prefix_cache"))["success"]:
        if time.monotonic() > deadline:
            raise EngineError("the prefix cache of the old weights cannot be emptied: requests hold it")
        time.sleep(0.2)


def post(base: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
    """The body of the answer. Raises EngineError for any other status than 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = json.dumps(dict(body or {})).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=SWAP_TIMEOUT_S) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode("utf-8", "replace")
        raise EngineError(f"{path}: HTTP {error.code}: {' '.join(said.split())[:300]}") from None
    except (OSError, HTTPException) as error:
        raise EngineError(f"{path}: {error}") from None
