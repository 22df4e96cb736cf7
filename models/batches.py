"""Batches of rows of like length, and a loss that weighs every token alike.

trainer = bucketed(SFTTrainer, tokens_per_row)(...)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

POOLED_BATCHES = 50
"""Batches' worth of random rows among which rows of like length are brought together."""


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
