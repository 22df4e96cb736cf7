"""What goes through the steps of a training run, and how much of the machine they use: tokens and pairs a
second, the share of padding, the share of time that waits for data, memory, and model FLOPs utilisation.

    counts = Counts(Work.of(model), read=row_counts)
    trainer = watched(SFTTrainer, counts)(..., data_collator=counts.counted(collate))

Everything is counted where rows are collated, on the host, from lengths that are known: no step waits for the
device to tell what it read. The numbers stand in what the trainer logs, beside the loss.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.families import of_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Any]]

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Of a GPU whose name holds this, dense bfloat16 by its maker's data sheet; the first that fits counts."""


@dataclass(frozen=True)
class Work:
    """What a token costs: parameters of the language model and projector that it passes through, those of
    them that train, layers, and the width of attention (heads x their size)."""

    parameters: int
    trained: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        """Of a model as it will train. An input embedding that is no output layer, too, costs nothing."""
        vision = set(of_model(model).vision_names(model))
        text = model.config.get_text_config()
        counted = {id(p): (p, name) for name, p in model.named_parameters() if name not in vision}
        looked_up = model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        if output is None or output.weight is not looked_up:
            counted.pop(id(looked_up), None)
        sizes = [(_size(p), p.requires_grad) for p, _ in counted.values()]
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            sum(size for size, _ in sizes),
            sum(size for size, trains in sizes if trains),
            text.num_hidden_layers,
            heads * head,
        )

    def flops(self, tokens: int, rows: int) -> float:
        """Of forward and backward passes over so many tokens in so many rows (arXiv 2204.02311, appendix B):
        2 a parameter forward, 2 back to the layer before, 2 for the gradient of one that trains, and 12 x
        layers x width x length for attention. The vision tower and what is computed twice do not count."""
        length = tokens / max(rows, 1)
        weights = 4 * self.parameters + 2 * self.trained
        return tokens * (weights + 12 * self.layers * self.width * length)


@dataclass(frozen=True)
class Batch:
    """tokens: read by the model, padding not counted; padded: with padding; rows: sequences; lengths: of the
    texts that a row is made of, summed, by name."""

    tokens: int
    padded: int
    rows: int
    lengths: dict[str, int]


class Counts:
    """read: of a row and its batch, {"tokens": read by the model, and sums to log as means}."""

    def __init__(self, work: Work, read: Callable[[Row, bool], dict[str, int]], items: str = "") -> None:
        self.work, self.items = work, items
        self._read = read
        self._collated: deque[Batch] = deque()
        self._window: list[Batch] = []
        self._waited = 0.0
        self._since: float | None = None

    def counted(self, collate: Collate) -> Collate:
        """The collator, with its batches counted."""

        def count(rows: list[Row]) -> dict[str, Any]:
            batch = collate(rows)
            parts = batch.get("parts", [batch])
            shared = "pair_ids" in parts[0]
            padded = sum((part["pair_ids"] if shared else part["input_ids"]).numel() for part in parts)
            found: dict[str, int] = {}
            for row in rows:
                for name, value in self._read(row, shared).items():
                    found[name] = found.get(name, 0) + value
            self._collated.append(Batch(found.pop("tokens"), padded, len(rows), found))
            return batch

        return count

    def fetched(self, batches: int, seconds: float) -> None:
        """A step has waited so long for its batches."""
        self._waited += seconds
        for _ in range(min(batches, len(self._collated))):
            self._window.append(self._collated.popleft())

    def begin(self) -> None:
        """The first step begins."""
        if self._since is None:
            self._since = time.perf_counter()

    def numbers(self, processes: int) -> dict[str, float]:
        """Since the last call, of all processes, which do alike; empty where nothing was counted."""
        now, window, waited = time.perf_counter(), self._window, self._waited
        began, self._since, self._window, self._waited = self._since, now, [], 0.0
        if not window or began is None:
            return {}
        seconds = max(now - began, 1e-9)
        tokens, rows = sum(batch.tokens for batch in window), sum(batch.rows for batch in window)
        flops = self.work.flops(tokens, rows) / seconds
        found = {
            "tokens_per_second": tokens * processes / seconds,
            "padding_share": 1 - tokens / sum(batch.padded for batch in window),
            "data_wait_share": waited / seconds,
            "memory_gb": peak_bytes() / 1e9,
            "tflops": flops / 1e12,
        }
        if self.items:
            found[f"{self.items}_per_second"] = rows * processes / seconds
        if peak := _peak_flops():
            found["mfu"] = flops / peak
        for name in window[0].lengths:
            found[name] = sum(batch.lengths[name] for batch in window) / rows
        return found


def sft_counts(row: Row, shared: bool) -> dict[str, int]:
    """Of a row of models.sft: its tokens, and those with a loss."""
    return {"tokens": row["length"], "length": row["length"], "trained_length": row["trained"]}


def pair_counts(row: Row, shared: bool) -> dict[str, int]:
    """Of a row of models.pairs, whose prompt is read once or with each completion."""
    prompt, chosen, rejected = (len(row[name]) for name in ("prompt", "chosen", "rejected"))
    tokens = prompt * (1 if shared else 2) + chosen + rejected
    return {"tokens": tokens, "prompt_length": prompt, "chosen_length": chosen, "rejected_length": rejected}


def watched(trainer: type, counts: Counts) -> type:
    """The trainer class, whose logs hold the numbers of `counts`."""

    class Watched(trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            counts.begin()
            began = time.perf_counter()
            batches, tokens = super().get_batch_samples(*args, **kwargs)
            counts.fetched(len(batches), time.perf_counter() - began)
            return batches, tokens

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if "loss" in logs:
                logs |= counts.numbers(self.accelerator.num_processes)
            super().log(logs, *args)

    return Watched


def peak_bytes() -> int:
    """Most memory so far: of this process's GPU if there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_flops() -> float | None:
    """Of this process's GPU; None where it is not in the table."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for known, peak in PEAK_TFLOPS.items() if known in name), None)


def _size(parameter: Any) -> int:
    """Numbers in a parameter; bitsandbytes holds two of them in a byte."""
    return int(parameter.numel()) * (2 if type(parameter).__name__ == "Params4bit" else 1)
