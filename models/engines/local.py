"""transformers in this process: batched decoding with a KV cache, image features computed once an image.

    engine = LocalEngine.load("artifacts/foundation/generator")
    engine.generate([Conversation(["images/a.png"], [("What is the sum of the top row?", "")])], Sampling())

Prompts are sorted by length and decoded in batches; samples of one prompt share its prefill, and rows that
have ended leave the batch, so that a few long answers do not keep many finished ones waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.base import Completion, Sampling
from models.images import ImageSource
from models.vlm import Conversation, Encoder, load, pad, stack_pixels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

KEEP_SHARE = 0.75
"""Drop ended rows from the batch when fewer than this share of its rows still run."""


class LocalEngine:
    """One model in this process. batch_size: rows decoded together. on_ended(rows): told while it decodes how
    many rows have ended since it was told last."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        images: ImageSource | str | Path = "data",
        batch_size: int = 256,
    ) -> None:
        self.model = model.eval()
        self.encoder = Encoder(processor, images)
        self.batch_size = batch_size
        self.on_ended: Callable[[int], None] = lambda rows: None
        self.end = processor.tokenizer.eos_token_id
        self.pad = processor.tokenizer.pad_token_id

    @classmethod
    def load(
        cls, checkpoint: str | Path, images: ImageSource | str | Path = "data", batch_size: int = 256
    ) -> LocalEngine:
        """An engine for a checkpoint folder."""
        model, processor = load(checkpoint)
        return cls(model, processor, images, batch_size)

    def generate(self, prompts: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in order (Engine.generate)."""
        import torch

        if not prompts:
            return []
        first = next((prompt.images for prompt in prompts if prompt.images), None)
        if first:
            self.encoder.prepare(first)
        ids = [self.encoder.prompt(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (len(ids[i]), i))
        draw = torch.Generator(self.model.device).manual_seed(sampling.seed)
        results: dict[int, Completion] = {}
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                tokens = self._decode(
                    [ids[i] for i in rows], [prompts[i].images for i in rows], sampling, draw
                )
                for i, row in zip(rows, tokens, strict=True):
                    results[i] = self._completion(row)
        return [results[i] for i in range(len(prompts))]

    def _completion(self, row: list[int]) -> Completion:
        finished = bool(row) and row[-1] == self.end
        text = self.encoder.tokenizer.decode(row[:-1] if finished else row, skip_special_tokens=False)
        return Completion(text, len(row), finished)

    def _decode(
        self, ids: list[list[int]], images: list[Sequence[str]], sampling: Sampling, draw: torch.Generator
    ) -> list[list[int]]:
        """Decode one batch; ids: prompts. Returns the new tokens of each row, the end token included."""
        import torch

        from models.engines.kv_cache import roomy_cache

        device = self.model.device
        prompts, prompt_of = _distinct(ids, images)
        tokens = pad([ids[i] for i in prompts], self.pad, left=True).to(device)
        mask = pad([[1] * len(ids[i]) for i in prompts], 0, left=True).to(device)
        position = mask.cumsum(-1).sub(1).clamp(min=0)
        seen = tokens if sampling.repetition_penalty != 1.0 else None
        cache = roomy_cache(self.model.config)
        pixels = stack_pixels(self.encoder, [images[i] for i in prompts])
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            **{key: value.to(device) for key, value in pixels.items()},
        }
        rows = torch.arange(len(ids), device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        out: list[list[int]] = [[] for _ in ids]
        for new in range(sampling.max_new_tokens):
            step = {
                "attention_mask": mask,
                "position_ids": position,
                "past_key_values": cache,
                "logits_to_keep": 1,
            }
            logits = self.model(**inputs, **step, use_cache=True).logits[:, -1]
            if new == 0 and len(prompts) < len(ids):  # the samples of a question go their own ways from here
                copies = torch.tensor(prompt_of, device=device)
                cache.batch_select_indices(copies)
                logits, mask, position = logits[copies], mask[copies], position[copies]
                seen = None if seen is None else seen[copies]
            chosen = _pick(logits.float(), sampling, draw, seen)
            for row, token, over in zip(rows.tolist(), chosen.tolist(), ended.tolist(), strict=True):
                if not over:
                    out[row].append(token)
            before, ended = ended, ended | (chosen == self.end)
            self.on_ended(int((ended & ~before).sum()))
            if bool(ended.all()):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position[:, -1:] + 1
            seen = None if seen is None else torch.cat([seen, chosen[:, None]], dim=1)
            running = (~ended).nonzero().squeeze(-1)
            if len(running) < KEEP_SHARE * len(rows):
                cache.batch_select_indices(running)
                rows, ended, chosen = rows[running], ended[running], chosen[running]
                mask, position = mask[running], position[running]
                seen = None if seen is None else seen[running]
            inputs = {"input_ids": chosen[:, None]}
        else:
            self.on_ended(int((~ended).sum()))  # cut off
        return out


def _distinct(ids: list[list[int]], images: list[Sequence[str]]) -> tuple[list[int], list[int]]:
    """Rows that stand for the distinct prompts, and for every row the number of its prompt among them."""
    numbers: dict[tuple[tuple[int, ...], tuple[str, ...]], int] = {}
    rows: list[int] = []
    prompt_of: list[int] = []
    for row, (tokens, pictures) in enumerate(zip(ids, images, strict=True)):
        number = numbers.setdefault((tuple(tokens), tuple(pictures)), len(rows))
        if number == len(rows):
            rows.append(row)
        prompt_of.append(number)
    return rows, prompt_of


def _pick(
    logits: torch.Tensor, sampling: Sampling, draw: torch.Generator, seen: torch.Tensor | None
) -> torch.Tensor:
    """Next tokens [rows] from logits [rows, vocabulary]: greedy, or temperature and top-p."""
    import torch

    if seen is not None:
        score = logits.gather(1, seen)
        score = torch.where(
            score < 0, score * sampling.repetition_penalty, score / sampling.repetition_penalty
        )
        logits = logits.scatter(1, seen, score)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    cumulated = probabilities.double().cumsum(-1)
    drawn = torch.rand(len(cumulated), 1, generator=draw, device=cumulated.device, dtype=cumulated.dtype)
    return torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True).squeeze(-1)
