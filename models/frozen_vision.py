"""Features of a frozen vision tower, computed once for an image and kept up to a number of bytes.

    with frozen_vision(model, max_bytes=1 << 29):
        model(**batch, image_ids=ids)       # ids: a number for each image of the batch, or tile, in its order

What is kept is what leaves the frozen part: a connector behind it still trains. An image is encoded alone, so
that its features are the same bits whatever batch it is first met in, and a resumed run ends as an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from models.forwards import Forward, backbone, replaced
from models.vlm import Encoder, stack_pixels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOWERS = ("vision_model", "vision_tower")
"""What families call a tower that takes an image, or each tile of it, as a row [3, height, width]."""
Features = tuple["torch.Tensor", ...]


def numbered_images(encoder: Encoder, pictures: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
    """The image tensors of a batch, and `image_ids`, a number for every image, or every tile of one.
    pictures: by row."""
    import torch

    tensors = stack_pixels(encoder, pictures)
    tiles = [number(*key) for names in pictures if names for key in _tiles(encoder, names)]
    return {**tensors, "image_ids": torch.tensor(tiles)} if tiles else tensors


def _tiles(encoder: Encoder, pictures: Sequence[str]) -> list[tuple[str, int]]:
    """Pictures and place among their rows [3, height, width]; nothing where a family cuts them into
    patches."""
    pixels = encoder.pixels(pictures)["pixel_values"]
    count = {5: pixels.shape[1], 4: pixels.shape[0]}.get(pixels.ndim, 0)
    return [("\n".join(pictures), place) for place in range(count)]


@lru_cache(maxsize=1 << 16)
def number(pictures: str, place: int) -> int:
    """A number that the name alone decides, the same in every batch and process; 56 bits."""
    return int.from_bytes(hashlib.blake2b(f"{place} {pictures}".encode(), digest_size=7).digest())


class FeatureCache:
    """Features (tensors [tokens, width]) by number of an image, the least recently used dropped first; they
    stay on the device where they were computed."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes, self.encoded = max_bytes, 0, 0
        self._kept: OrderedDict[int, Features] = OrderedDict()

    def get(self, image: int) -> Features | None:
        """The features, which are now the most recently used; None if they are not kept."""
        if image in self._kept:
            self._kept.move_to_end(image)
        return self._kept.get(image)

    def put(self, image: int, features: Features) -> None:
        """Keep them, and drop others until all fit."""
        self.encoded += 1
        self._kept[image] = features
        self.bytes += _size(features)
        while self.bytes > self.max_bytes:
            self.bytes -= _size(self._kept.popitem(last=False)[1])


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features)


def tower_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """The vision tower, if it has one of `TOWERS` and it is frozen; else None, and nothing is kept."""
    tower = next((getattr(backbone(model), name) for name in TOWERS if hasattr(backbone(model), name)), None)
    trains = tower is not None and any(weight.requires_grad for weight in tower.parameters())
    return None if trains else tower


@contextmanager
def frozen_vision(model: PreTrainedModel, max_bytes: int) -> Iterator[FeatureCache]:
    """Within, a forward pass with `image_ids` (a tensor [rows of the tower]) asks the tower only for images
    not kept. max_bytes: 0 to keep none, and to encode the images of a batch together."""
    cache, tower = FeatureCache(max_bytes), tower_of(model) if max_bytes else None
    layers = getattr(model.config, "vision_feature_layer", None)
    asked: list[int] = []

    def remembering(read: Forward) -> Forward:
        def forward(*args: Any, image_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            asked[:] = [] if image_ids is None else image_ids.tolist()
            return read(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        stack.enter_context(replaced(backbone(model), remembering))
        if tower is not None:
            wanted = [layers] if isinstance(layers, int) else layers
            stack.enter_context(replaced(tower, lambda encode: _cached(encode, cache, asked, wanted)))
        yield cache


def _cached(encode: Forward, cache: FeatureCache, asked: list[int], layers: list[int] | None) -> Forward:
    """The tower's forward; `asked` are the images that stand in its next rows. layers: whose states the model
    reads, None for the last states."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def features(row: int, pixels: torch.Tensor, options: dict[str, Any]) -> Features:
        kept = cache.get(asked[row])
        if kept is None:
            alone = slice(row, row + 1)
            own = {key: value[alone] if torch.is_tensor(value) else value for key, value in options.items()}
            with torch.no_grad():
                out = encode(pixels[alone], **own)
            read = [out.last_hidden_state] if layers is None else [out.hidden_states[at] for at in layers]
            kept = tuple(states[0] for states in read)
            cache.put(asked[row], kept)
        return kept

    def forward(pixel_values: torch.Tensor, **options: Any) -> Any:
        if len(asked) != len(pixel_values):
            return encode(pixel_values, **options)
        rows = [features(row, pixel_values, options) for row in range(len(asked))]
        states = [torch.stack(same) for same in zip(*rows, strict=True)]
        if layers is None:
            return BaseModelOutputWithPooling(last_hidden_state=states[0])
        return BaseModelOutputWithPooling(hidden_states=dict(zip(layers, states, strict=True)))

    return forward
