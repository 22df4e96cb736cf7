"""Models of the shapes that teams train, with random weights: speed and memory do not ask what was learnt.

    from benchmarks.shapes import SHAPES
    model, processor, picture = SHAPES["llava-next-8b"].build("bfloat16")

Widths, depths, vocabulary and the tokens of an image are those of the published configs named below; the
tokenizer is a small one. For a GPU: weights, gradients and moments in bfloat16 take 8 GB a billion
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.tiny_families import TINY

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128320,
}
"""Llama 3 8B, with the rows that LLaVA-NeXT adds to its vocabulary."""
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
}
"""Llama 3.2 1B."""
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
"""Qwen2.5-VL-7B; QWEN_2B has the widths of its 3B model and half of its depth."""
QWEN_2B = QWEN_7B | {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""CLIP-L/14 at 336 pixels."""
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}


@dataclass(frozen=True)
class Shape:
    """family: a key of the tests' tiny families, whose processor and chat format it has; text and vision:
    what its config has instead of the tiny one's; side_px: of a square picture."""

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    side_px: int

    def build(self, dtype: str) -> tuple[Any, Any, Callable[[str], Any]]:
        """Model (on the GPU if there is one), processor, and pictures by name."""
        import torch
        from transformers import AutoModelForImageTextToText

        tiny = TINY[self.family]
        processor = tiny.make_processor()
        _full_size(processor)
        config = tiny.config(processor).to_dict()
        config["text_config"].pop("layer_types", None)  # one for each of the tiny model's layers
        for part, sizes in (("text_config", self.text), ("vision_config", self.vision)):
            config[part] |= sizes | (
                {"out_hidden_size": self.text["hidden_size"]} if "depth" in sizes else {}
            )
        config["image_grid_pinpoints"] = getattr(processor.image_processor, "image_grid_pinpoints", None)
        made = type(tiny.config(processor)).from_dict({k: v for k, v in config.items() if v is not None})
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(made, dtype=getattr(torch, dtype))
        return model.eval(), processor, self.picture

    def picture(self, name: str) -> Any:
        """Noise that the name fixes."""
        import numpy as np
        from PIL import Image

        noise = np.random.default_rng(int(name)).integers(0, 256, size=(self.side_px, self.side_px, 3))
        return Image.fromarray(noise.astype(np.uint8))


def _full_size(processor: Any) -> None:
    """The sizes of the published image processors, in place of the tests' small ones."""
    images = processor.image_processor
    if hasattr(images, "image_grid_pinpoints"):  # LLaVA-NeXT: tiles of 336, at most four and the whole
        side = CLIP_L["image_size"]
        images.size, images.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
        images.image_grid_pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
        processor.patch_size = CLIP_L["patch_size"]
    else:  # Qwen2.5-VL: as many patches as the picture has
        images.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


SHAPES = {
    "llava-next-1b": Shape("llava_next", LLAMA_1B, CLIP_L, 672),
    "llava-next-8b": Shape("llava_next", LLAMA_8B, CLIP_L, 672),
    "qwen2.5-vl-2b": Shape("qwen2_5_vl", QWEN_2B, QWEN_VISION, 1008),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", QWEN_7B, QWEN_VISION, 1008),
}
