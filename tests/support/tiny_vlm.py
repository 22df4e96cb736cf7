"""The smallest vision-language model of the embedded kind, random, with pictures and lessons to go with it.

from tests.support.tiny_vlm import CONFIG, lessons, model, picture, processor
"""

from __future__ import annotations

import zlib
from typing import Any

from models.pairs import PreferenceExample
from models.tiny import TinyConfig, build_model, build_processor, train_tokenizer
from models.vlm import Conversation

CONFIG = TinyConfig(
    vocabulary=400, hidden=64, layers=2, intermediate=96, vision_hidden=32, vision_layers=1, max_positions=512
)


def lessons(count: int = 12, turns: int = 2) -> list[Conversation]:
    """Conversations of unequal length about one picture each."""
    return [
        Conversation(
            [f"picture {n}"],
            [(f"What is the sum of row {n % 3 + 1}?", f"it is {n * 7} " + "and more " * (n % 4))]
            + [(f"Is {n} even?", "yes" if n % 2 == 0 else "no")] * (turns - 1),
        )
        for n in range(count)
    ]


def pairs(count: int) -> list[PreferenceExample]:
    """Open questions on a picture each, with two answers."""
    return [
        PreferenceExample(
            Conversation([f"picture {n}"], [(f"What is the sum of row {n % 3 + 1}?", "")]),
            f"it is {n}",
            f"it is {n + 1} or more",
        )
        for n in range(count)
    ]


def processor() -> Any:
    """A processor whose tokenizer knows the lessons' words."""
    texts = [text for conversation in lessons() for turn in conversation.turns for text in turn]
    return build_processor(train_tokenizer(texts, CONFIG.vocabulary), CONFIG)


def model(processor: Any, seed: int = 0) -> Any:
    """A random model in eval mode."""
    import torch

    torch.manual_seed(seed)
    return build_model(CONFIG, processor.tokenizer).eval()


def lively(model: Any) -> Any:
    """The model with weights so large that greedy texts differ by prompt and picture and do not repeat."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "connector" in name or ("layers" in name and weight.ndim == 2):
                weight.mul_(10)
    return model


def picture(name: str) -> Any:
    """A picture by name (models.images.ImageSource): noise that the name fixes."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, size=(48, 48, 3))
    return Image.fromarray(noise.astype(np.uint8))
