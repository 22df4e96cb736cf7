"""Preference pairs as token ids, and their batches: plain rows as TRL has them, or prompts that are shared.

rows, too_long = encode_pairs(encoder, pairs, max_tokens)
batch = SharedCollator(encoder)(rows[:8])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.families import token_types
from models.frozen_vision import numbered_images
from models.vlm import Conversation, Encoder, pad

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PreferenceExample:
    """An open prompt (images, question) with the preferred and the dispreferred completion.

    prefix: the beginning of the answer that both share, read but not trained on; *_goes_on: that completion
    is cut before its end, and gets no end of turn.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    prefix: str = ""
    chosen_goes_on: bool = False
    rejected_goes_on: bool = False


def encode_pairs(
    encoder: Encoder, pairs: Sequence[PreferenceExample], max_tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows {"pictures", "prompt", "chosen", "rejected", "length"} of token ids,
    and how many pairs were too long and left out.

    Not "images": of rows with this column TRL takes no reference log-probabilities computed before.
    """
    rows, long = [], 0
    first = next((pair.prompt.images for pair in pairs if pair.prompt.images), None)
    if first:
        encoder.prepare(first)
    for pair in pairs:
        prompt = encoder.prompt(pair.prompt) + encoder.answer_ids(pair.prefix, goes_on=True)
        chosen = encoder.answer_ids(pair.chosen, pair.chosen_goes_on)
        rejected = encoder.answer_ids(pair.rejected, pair.rejected_goes_on)
        if len(prompt) + max(len(chosen), len(rejected)) > max_tokens:
            long += 1
            continue
        length = len(prompt) + max(len(chosen), len(rejected))
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "length": length}
        rows.append({"pictures": list(pair.prompt.images), **row})
    return rows, long


class PreferenceCollator:
    """Encoded pairs to TRL's layout: the chosen rows first, then the rejected ones."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, completion_mask [2 x rows, longest], and the image tensors twice."""
        completions = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        prompts = [row["prompt"] for row in rows] * 2
        ids = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        masks = [
            [0] * len(prompt) + [1] * len(completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        input_ids = pad(ids, self.encoder.tokenizer.pad_token_id, left=False)
        return {
            "input_ids": input_ids,
            "attention_mask": pad([[1] * len(row) for row in ids], 0, left=False),
            "completion_mask": pad(masks, 0, left=False),
            **token_types(self.encoder.processor, input_ids),
            **numbered_images(self.encoder, [row["pictures"] for row in rows] * 2),
            **_reference(rows),
        }


class SharedCollator(PreferenceCollator):
    """Encoded pairs, a row each: `models.shared_prompt`."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """pair_ids and attention_mask [rows, P + 2C]; input_ids and completion_mask [2 x rows, 1 + C], the
        completions behind the token before them; the image tensors once."""
        import torch

        blank = self.encoder.tokenizer.pad_token_id
        prompts = [row["prompt"] for row in rows]
        sides = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        prompt, read = (
            pad(prompts, blank, left=False),
            pad([[1] * len(ids) for ids in prompts], 0, left=False),
        )
        said, trained = pad(sides, blank, left=False), pad([[1] * len(ids) for ids in sides], 0, left=False)
        before = torch.tensor([[ids[-1]] for ids in prompts * 2])
        return {
            "pair_ids": torch.cat([prompt, *said.chunk(2)], dim=1),
            "attention_mask": torch.cat([read, *trained.chunk(2)], dim=1),
            "input_ids": torch.cat([before, said], dim=1),
            "completion_mask": torch.cat([torch.zeros_like(before), trained], dim=1),
            **numbered_images(self.encoder, [row["pictures"] for row in rows]),
            **_reference(rows),
        }


def _reference(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The reference's log-probabilities [rows], where they are known."""
    import torch

    names = ("ref_chosen_logps", "ref_rejected_logps")
    return {name: torch.tensor([row[name] for row in rows]) for name in names if name in rows[0]}
