"""Batches of rows of like length, and a loss that weighs every token alike.

trainer = bucketed(SFTTrainer, tokens_per_row)(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from models.vlm import IGNORE

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Any]]
Size = TypeVar("Size")

POOLED_BATCHES = 50
"""Batches' worth of random rows among which rows of like length are brought together."""


def in_parts(
    sizes: Sequence[Size], tokens_of: Callable[[Sequence[Size]], int], rows: int, tokens: int
) -> list[list[int]]:
    """Indices of rows, the longest first, in parts of at most so many rows and at most so many tokens,
    padding counted. tokens_of: of a part; tokens: 0 for no limit. A row above it is a part of its own."""
    parts: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -tokens_of([sizes[index]])):
        part = [*parts[-1], index] if parts else []
        padded = tokens_of([sizes[i] for i in part]) if part else 0
        if part and len(part) <= rows and (not tokens or padded <= tokens):
            parts[-1] = part
        else:
            parts.append([index])
    return parts


class PartedCollator:
    """A batch as {"parts": batches of at most so many tokens}, each made by `collate`. size: of a row, for
    `tokens_of`."""

    def __init__(
        self,
        collate: Collate,
        size: Callable[[Row], Size],
        tokens_of: Callable[[Sequence[Size]], int],
        tokens: int,
    ) -> None:
        self.collate, self.size, self.tokens_of, self.tokens = collate, size, tokens_of, tokens

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """{"parts": [batches]}."""
        parts = in_parts([self.size(row) for row in rows], self.tokens_of, len(rows), self.tokens)
        return {"parts": [self.collate([rows[index] for index in part]) for part in parts]}


def padded_tokens(lengths: Sequence[int]) -> int:
    """Of a batch of rows of these lengths."""
    return len(lengths) * max(lengths)


class LengthBuckets:
    """A sampler whose consecutive batches hold rows of like length, the batches in random order:
    padding falls from about half to a few percent where lengths vary.

    The order is a function of seed and epoch alone (`set_epoch`): a resumed run meets the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths)).tolist()
        pool = POOLED_BATCHES * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        ragged = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        for index in generator.permutation(len(whole)).tolist():
            yield from whole[index]
        for batch in ragged:
            yield from batch


def bucketed(trainer: type, tokens_per_row: float | None = None) -> type:
    """The trainer class with `LengthBuckets` over the `length` column of its data set.

    tokens_per_row: mean number of tokens with a loss. Where it is given the loss of a batch is its sum over
    the expected number of tokens: a mean over the batch's own would weigh every token of the batches of short
    rows several times as much, and a model would learn to write short chains more often than its data does.
    """

    class Bucketed(trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, tokens = super().get_batch_samples(*args, **kwargs)
            if tokens_per_row is not None and tokens is not None:
                rows = sum(len(batch["input_ids"]) for batch in batches)
                ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                tokens = tokens * 0 + tokens_per_row * rows * ranks
            return batches, tokens

        def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
            rows = self.train_dataset if train_dataset is None else train_dataset
            ranks = self.accelerator.num_processes  # which take batches of a step by turns
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks
            return LengthBuckets(rows["length"], size, self.args.data_seed)

    return Bucketed


def parted(trainer: type) -> type:
    """The trainer class for the batches of a `PartedCollator`: a step's parts are run one after another, and
    the loss is that of the batch as a whole, a mean over its tokens with a label."""

    class Parted(trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, _ = super().get_batch_samples(*args, **kwargs)
            parts = [part for batch in batches for part in batch["parts"]]
            return batches, sum((part["labels"][:, 1:] != IGNORE).sum() for part in parts)

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            run = super().training_step
            return sum(run(model, part, num_items_in_batch) for part in inputs["parts"])

    return Parted
