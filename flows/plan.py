"""What a profile would run and what it takes, before anything is spent: models, tokens, GPU-hours, memory.

    longview run --profile llava-next-8b --dry-run

The figures are arithmetic on the profile's own numbers and on the assumptions below, not measurements: no
model of this size has gone through this pipeline. Expect them to be right within a factor of two or three.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.checks import Finding
from tasks.launch import Hardware
from tasks.training_memory import ONE, fits, per_gpu

QUESTION, STEP, STEPS, ANSWER = 300, 100, 5, 10
"""Tokens of a question with its prompt, of a step, of an answer; steps of a chain."""
CHAIN = STEP * STEPS
GPU_FLOPS, GPU_GB = 989e12, 80
"""Of an H100: bfloat16 without sparsity."""
TRAINING, READING, WRITING = 0.35, 0.40, 0.10
"""Share of the peak that training, reading a prompt and writing in a full batch reach."""
PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


@dataclass(frozen=True)
class Size:
    """parameters and vision: all, and those of the vision tower; image_tokens: of a photograph of one
    megapixel; model_type: of its config, None for a model that only serves. After the model cards."""

    parameters: float
    vision: float
    image_tokens: int
    model_type: str | None = None


SIZES = {
    "llava-hf/llama3-llava-next-8b-hf": Size(8.36e9, 0.30e9, 2928, "llava_next"),
    "Qwen/Qwen2.5-VL-7B-Instruct": Size(8.29e9, 0.63e9, 1300, "qwen2_5_vl"),
    "Qwen/Qwen3-VL-8B-Instruct": Size(8.77e9, 0.54e9, 1024, "qwen3_vl"),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Size(0.256e9, 0.086e9, 1088, "idefics3"),
    "HuggingFaceTB/SmolVLM-500M-Instruct": Size(0.508e9, 0.086e9, 1088, "idefics3"),
    "Qwen/Qwen2-VL-72B-Instruct": Size(73.4e9, 0.63e9, 1300),
    "Qwen/Qwen2-72B-Instruct": Size(72.7e9, 0.0, 0),
}


@dataclass(frozen=True)
class Row:
    """One line: tokens read, written and trained on; memory_gb of a GPU: all that is trained or frozen beside
    it, or the weights alone where it serves in bfloat16. Activations and KV cache come on top."""

    stage: str
    model: str
    read: float = 0.0
    written: float = 0.0
    trained: float = 0.0
    gpu_hours: float | None = None
    memory_gb: float | None = None


def rows(p: Mapping[str, Any], hardware: Hardware | None = None) -> list[Row]:
    """The costly stages in order. p: parsed sections of a profile with `foundation.hub`
    (tasks.params.validate)."""
    base = p["foundation"].hub.partition("@")[0]
    g, s, own = p["generate"], p["sample"], p["summary_data"]
    paths, sampled = g.questions * g.samples, s.questions * s.samples
    example = _prompt(base) + CHAIN
    reasoning = g.questions  # at most one path a question
    c, first, second = p["curate"], p["reasoning_sft"], p["summary_sft"]
    summary = reasoning * (c.optimal + c.flawed + c.wrong) + own.questions * own.samples
    pairs = min(p["score"].max_pairs, s.questions * p["score"].pairs_per_question)

    def asked(stage: str, role: str, questions: float, chains: float, written: float) -> Row:
        model = getattr(p["engines"], role).model or base
        read = questions * _prompt(model) + chains * CHAIN
        return serving(stage, model, read, written)

    def trained(stage: str, section: Any, tokens: float, reference: bool = False) -> Row:
        epochs = section.budget.epochs
        return training(stage, base, tokens * epochs, section.lora, hardware or ONE, reference)

    def grpo_round(stage: str) -> Row:
        """At most: as if all questions were of middling difficulty."""
        chains = s.questions * p["grpo"].group.generations
        learning = trained(stage, p["grpo"], chains * example)
        epochs = p["grpo"].budget.epochs
        sampling = serving(stage, base, epochs * s.questions * _prompt(base), epochs * chains * CHAIN)
        hours = [row.gpu_hours for row in (learning, sampling) if row.gpu_hours is not None]
        return replace(
            learning, read=sampling.read, written=sampling.written, gpu_hours=sum(hours) if hours else None
        )

    found = [
        asked("generate", "generator", g.questions, paths, paths * (CHAIN + ANSWER)),
        asked("assess", "answer_judge", paths, 0, paths),
        asked("assess", "path_judge", g.questions, paths, ANSWER * paths),
        trained("reasoning_sft", first, reasoning * (1 + first.general) * example),
        asked("summary_data", "reasoner", own.questions, 0, own.questions * own.samples * CHAIN),
        trained("summary_sft", second, summary * (1 + second.general) * example),
    ]
    for name in p["rounds"]:
        found += [
            asked(f"sample@{name}", "reasoner", s.questions, 0, sampled * CHAIN),
            asked(f"score@{name}", "path_judge", s.questions, sampled, ANSWER * sampled),
            grpo_round(f"dpo@{name}")
            if p["rounds"][name].trainer == "grpo"
            else trained(f"dpo@{name}", p["dpo"], 2 * pairs * example, reference=True),
        ]
    return found


def _prompt(model: str) -> int:
    """Tokens of a question with its image. The samples of a question share them (prefix caching)."""
    return QUESTION + (SIZES[model].image_tokens if model in SIZES else 0)


def serving(stage: str, model: str, read: float, written: float) -> Row:
    """2 FLOPs a parameter and token."""
    size = SIZES.get(model)
    if size is None:
        return Row(stage, model, read, written)
    seconds = 2 * size.parameters * (read / READING + written / WRITING) / GPU_FLOPS
    return Row(stage, model, read, written, gpu_hours=seconds / 3600, memory_gb=2 * size.parameters / 1e9)


def training(
    stage: str,
    model: str,
    tokens: float,
    lora: Any = None,
    hardware: Hardware = ONE,
    reference: bool = False,
) -> Row:
    """6 FLOPs a trained parameter and token, 4 one under adapters (its gradient is not computed), 2 a frozen
    one; a reference reads all tokens once more, and is not in memory beside the rest."""
    size = SIZES.get(model)
    if size is None:
        return Row(stage, model, trained=tokens)
    flops = (6 if lora is None else 4) * (size.parameters - size.vision) + 2 * size.vision
    flops += 2 * size.parameters * reference
    hours = flops * tokens / TRAINING / GPU_FLOPS / 3600
    memory = per_gpu(size.parameters, size.vision, lora, hardware)
    return Row(stage, model, trained=tokens, gpu_hours=hours, memory_gb=memory / 1e9)


def problems(p: Mapping[str, Any], root: Path, hardware: Hardware | None = None) -> Iterator[Finding]:
    """Everything that would stop a run of the profile, or make it other than it says."""
    hub = p["foundation"].hub
    if not PINNED.fullmatch(hub):
        advice = "write owner/name@<the 40 digits of a commit>, from the model's page"
        yield Finding("problem", "foundation", f"{hub} is not pinned to a revision", advice)
    base = hub.partition("@")[0]
    yield from _family(base)
    for role in ("generator", "answer_judge", "path_judge", "reasoner", "summariser"):
        yield from _engine(role, getattr(p["engines"], role))
    for row in rows(p, hardware):
        again = "@" in row.stage and not row.stage.endswith("@r1")
        if row.trained and row.memory_gb and row.memory_gb > GPU_GB and not again:
            text = f"needs {row.memory_gb:.0f} GB for weights and optimizer, a GPU has {GPU_GB}"
            stage, _, name = row.stage.partition("@")
            size, lora = SIZES[base], p[p["rounds"][name].trainer if name else stage].lora
            ways = fits(size.parameters, size.vision, lora, GPU_GB * 1e9, root)
            yield Finding("problem", row.stage, text, " or ".join(ways) or "take a smaller model")
    if not (root / "data/records.jsonl").is_file():
        yield Finding("problem", "data", "no records in data/", "longview data import FOLDER")


def _family(base: str) -> Iterator[Finding]:
    from tasks.foundation import families

    size = SIZES.get(base)
    if size is None:
        text = f"{base} is no model whose size is known: no estimate"
        yield Finding("note", "foundation", text, "add it to SIZES in flows/plan.py")
        return
    family = next((f for f in families() if size.model_type in f.model_types), None)
    if family is None:
        yield Finding("problem", "foundation", f"{base} only serves: no family", "models/families.py")
    elif family.needs_torchvision and find_spec("torchvision") is None:
        text = f"the processor of {family.name} needs torchvision, which is not installed"
        yield Finding("problem", "foundation", text, "install the build of torchvision that fits torch")


def _engine(role: str, e: Any) -> Iterator[Finding]:
    if e.kind == "local":
        advice = f"engines.{role}: kind vllm, or openai with the url of a server"
        yield Finding("problem", role, "kind: local decodes on the CPU", advice)
    unset = sorted(set(re.findall(r"\$\{?(\w+)", e.python or "")) - os.environ.keys())
    if unset:
        yield Finding(
            "problem", role, f"{', '.join(unset)} is not set", "docs/engines.md: vLLM's environment"
        )
    elif e.kind == "vllm" and shutil.which(e.interpreter) is None:
        yield Finding("problem", role, f"{e.interpreter} is no interpreter", "docs/engines.md")
    if e.url is not None and not _listens(e.url):
        yield Finding("problem", role, f"no server at {e.url}", f"start one for {e.model}")


def _listens(url: str) -> bool:
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False


def lines(p: Mapping[str, Any], hardware: Hardware | None = None) -> Iterator[str]:
    """The table and what it stands on."""
    yield f"{'stage':14} {'model':36} {'read':>8} {'written':>8} {'trained':>8} {'GPU-h':>8} {'GB':>6}"
    total = 0.0
    for row in rows(p, hardware):
        total += row.gpu_hours or 0.0
        tokens = " ".join(f"{_short(n):>8}" for n in (row.read, row.written, row.trained))
        hours = "?" if row.gpu_hours is None else f"{row.gpu_hours:,.1f}"
        memory = "?" if row.memory_gb is None else f"{row.memory_gb:,.0f}"
        yield f"{row.stage:14} {row.model:36} {tokens} {hours:>8} {memory:>6}"
    yield f"about {math.ceil(total):,} GPU-hours, evaluation left out. An estimate for H100s, by FLOPs:"
    yield (
        f"chains of {STEPS} steps of {STEP} tokens, a photograph a question, {TRAINING:.0%} of the peak in"
        f" training, {READING:.0%} reading, {WRITING:.0%} writing."
    )
    where = f"on {hardware.name}" if hardware else "on one GPU (--hardware)"
    yield f"GB of a GPU: weights, gradients and AdamW in training, {where}; weights where a model serves."


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}" if number else "-"
