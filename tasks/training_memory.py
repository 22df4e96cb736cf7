"""Memory of a GPU that training takes: weights, gradients and AdamW's states. Activations come on top.

    from tasks.training_memory import per_gpu
    per_gpu(parameters=8.4e9, frozen=0.3e9, lora=None, hardware=launch.read("8gpu-zero3")) / 1e9

Arithmetic after ZeRO (arXiv 1910.02054, 3) and QLoRA (arXiv 2305.14314, 3), not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from models.adapters import Lora
from tasks.launch import Hardware, names, read

FULL, HALF, QUANTIZED = 4.0, 2.0, 0.52
"""Bytes of a weight in float32, in 16 bits, in nf4 with its constants."""
MOMENTS = 8.0
"""AdamW's two, in float32."""
ADAPTER_SHARE, ADAPTER_RANK = 0.02, 64
"""Parameters of adapters on all linear layers, of those of the model, at this rank (168 million of Llama 3
8B's eight billion)."""
ONE = Hardware(Path("hardware/one"))
"""One process, one GPU, no DeepSpeed."""


def per_gpu(parameters: float, frozen: float, lora: Lora | None, hardware: Hardware = ONE) -> float:
    """Bytes. parameters: of the model; frozen: those of them that never train.

    Without DeepSpeed weights that train lie in float32 and compute in bfloat16; with it they lie in bfloat16,
    beside a copy in float32 that belongs to the optimizer.
    """
    weights, trained = parameters, parameters - frozen
    if lora is not None:
        trained = ADAPTER_SHARE * parameters * lora.rank / ADAPTER_RANK
        own = QUANTIZED if lora.quantized else HALF
    else:
        own = HALF if hardware.zero_stage else FULL
    states = trained * (MOMENTS + (FULL if hardware.zero_stage else 0))
    gradients = trained * (HALF if hardware.zero_stage else FULL)
    base = weights * own + (trained * FULL if lora is not None else 0)
    split = hardware.processes
    return (
        base / (split if hardware.zero_stage == 3 else 1)
        + gradients / (split if hardware.zero_stage >= 2 else 1)
        + (0 if hardware.offload else states / (split if hardware.zero_stage else 1))
    )


def fits(parameters: float, frozen: float, lora: Lora | None, gpu_bytes: float, root: Path) -> Iterator[str]:
    """Ways to train the model with at most so many bytes a GPU: the hardware there is, then adapters on one
    GPU."""
    for name in names(root):
        hardware = read(name, root)
        if not hardware.on_cpu and per_gpu(parameters, frozen, lora, hardware) <= gpu_bytes:
            yield f"--hardware {name}"
    adapter = lora or Lora()
    for quantized in (False, True):
        if per_gpu(parameters, frozen, replace(adapter, quantized=quantized)) <= gpu_bytes:
            yield f"lora: {{rank: {adapter.rank}{', quantized: true' if quantized else ''}}} on one GPU"
