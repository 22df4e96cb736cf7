"""What the benchmarks of training share: the embedded model with pictures, runs in processes of their own,
and what is read off them.

    model, processor, picture = embedded()
    run = in_a_process("benchmarks.sft", "--one", "plain TRL", "--case", "embedded")
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.results import ROOT


def picture(name: str) -> Any:
    """models.images.ImageSource: noise that the name fixes."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(int(name)).integers(0, 256, size=(48, 48, 3))
    return Image.fromarray(noise.astype(np.uint8))


def embedded(**sizes: int) -> tuple[Any, Any, Any]:
    """The untrained embedded model (models.tiny.TinyConfig, float32) or one of other sizes, its processor and
    pictures by name."""
    import torch

    from models.tiny import TinyConfig, build_model, build_processor, train_tokenizer

    config = TinyConfig(**sizes)
    tokenizer = train_tokenizer([" ".join(map(str, range(100)))] * 4, config.vocabulary)
    torch.manual_seed(0)
    return build_model(config, tokenizer).eval(), build_processor(tokenizer, config), picture


def build(shape: str | None) -> tuple[Any, Any, Any]:
    """The embedded model, or one of benchmarks.shapes in bfloat16: model, processor and pictures."""
    from models.families import of_model

    if shape:
        from benchmarks.shapes import SHAPES

        model, processor, pictures = SHAPES[shape].build("bfloat16")
    else:
        model, processor, pictures = embedded()
    of_model(model).settle(processor)
    return model, processor, pictures


def peak_bytes() -> int:
    """Most memory so far: of the GPU if there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Fetched:
    """By step: seconds that the trainer waited for its rows, their tokens, and those with padding."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded: list[int] = field(default_factory=list)


@contextmanager
def fetches(pad_id: int) -> Iterator[Fetched]:
    """What transformers' trainer fetches within, filled as it goes."""
    from transformers import Trainer

    own, found = Trainer.get_batch_samples, Fetched()

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        batches, count = own(*args, **kwargs)
        found.seconds.append(time.perf_counter() - began)
        ids = [part["input_ids"] for batch in batches for part in batch.get("parts", [batch])]
        found.tokens.append(sum(int((row != pad_id).sum()) for row in ids))
        found.padded.append(sum(row.numel() for row in ids))
        return batches, count

    Trainer.get_batch_samples = timed
    try:
        yield found
    finally:
        Trainer.get_batch_samples = own


def in_a_process(module: str, *words: str) -> dict[str, Any]:
    """What a benchmark prints last when it is run with these words."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
