"""New weights in a real vLLM: reloaded where the probe agrees, started again where it does not, LoRA by
name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from models.adapters import Lora, load_for_training
from models.engines.weights import Disagreement, Probing
from models.probe import read_probe, save_with_probe
from tasks.engines import EngineParams
from tasks.served import SERVERS, in_worker, served, stop_lingering
from tests.support import tiny_vlm

ARGUMENTS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"),
    *("--gpu-memory-utilization", "0.1", "--limit-mm-per-prompt", '{"image": 1}'),
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),  # starts sooner
]
LORA = ["--enable-lora", "--max-lora-rank", "8"]
PLAIN_RELOAD = ["--worker-extension-cls", "argparse.Namespace"]
"""An extension of somebody else's, in place of ours: vLLM's own reload is what is left."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_processor: Any) -> Path:
    """Two checkpoints with tied embeddings, and two adapters of the first as a training stage makes them,
    each with its probe."""
    import torch

    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (0, 1):
        model = tiny_vlm.lively(tiny_vlm.model(tiny_processor, seed))
        assert model.config.tie_word_embeddings
        save_with_probe(model, tiny_processor, folder / f"r{seed}")
    for seed in (0, 1):
        adapted, processor = load_for_training(folder / "r0", Lora(rank=8, alpha=16), seed)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if ".lora_B." in name:  # zero until it trains
                    weight.normal_(std=0.1)
        save_with_probe(adapted, processor, folder / f"adapter{seed}")
    return folder


@pytest.fixture
def engine(vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """engine(*arguments, **others): parameters of one on this vLLM; servers that linger end with the test."""
    monkeypatch.chdir(tmp_path)

    def params(*arguments: str, **others: Any) -> EngineParams:
        return EngineParams(
            python=vllm_python,
            arguments=[*ARGUMENTS, *arguments],
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            **others,
        )

    yield params
    stop_lingering(SERVERS)


def serve(e: EngineParams, checkpoint: Path) -> tuple[str, str, dict[str, int]]:
    """One stage that has this checkpoint served: address, name, and what had to be done. It fails by itself
    if the log-probs are not those of the checkpoint's probe."""
    swaps: Counter[str] = Counter()
    with served("reasoner", e, str(checkpoint), checkpoint, swaps) as engine:
        probe = read_probe(checkpoint)
        assert probe is not None and Probing(probe, 0.001).distance(engine) < 0.001
        return engine.url, engine.model, dict(swaps)


def test_the_next_stage_reloads_tied_weights_and_adapters_by_name(engine: Any, checkpoints: Path) -> None:
    e = engine(*LORA, kind="openai", launch=True, linger_s=120)
    used, reloaded = {"reloads": 0, "restarts": 0}, {"reloads": 1, "restarts": 0}
    url, _, swaps = serve(e, checkpoints / "r0")
    assert swaps == used
    assert serve(e, checkpoints / "r1") == (url, "longview", reloaded)
    assert serve(e, checkpoints / "r1") == (url, "longview", used)
    names = []
    for round in (0, 1):
        where, name, swaps = serve(e, checkpoints / f"adapter{round}")
        assert (where, swaps) == (url, reloaded)
        names.append(name)
    assert len(set(names)) == 2 and all(name.startswith("adapter-") for name in names)
    assert serve(e, checkpoints / "r0") == (url, "longview", reloaded)


def test_a_stale_output_layer_is_found_and_the_server_started_again(engine: Any, checkpoints: Path) -> None:
    e = engine(*PLAIN_RELOAD, kind="openai", launch=True, linger_s=120)
    serve(e, checkpoints / "r0")
    _, _, swaps = serve(e, checkpoints / "r1")
    assert swaps == {"reloads": 0, "restarts": 1}


def test_an_engine_of_the_stage_s_own_serves_an_adapter_and_is_checked(
    engine: Any, checkpoints: Path
) -> None:
    with in_worker("reasoner", engine(kind="vllm"), str(checkpoints / "adapter0"), checkpoints) as own:
        Probing(read_probe(checkpoints / "adapter0"), 0.001).check(own)
        with pytest.raises(Disagreement, match="does not serve the weights that were trained"):
            Probing(read_probe(checkpoints / "r0"), 0.02).check(own)
