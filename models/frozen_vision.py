"""Features of a frozen vision tower, computed once for an image and kept up to a number of bytes.

    with frozen_vision(model, max_bytes=1 << 29):
        model(**batch, image_ids=ids)       # ids: a number for each image of the batch, in its order

What is kept is what leaves the frozen part: a connector behind it still trains. An image is encoded alone, so
that its features are the same bits whatever batch it is first met in, and a resumed run ends as an
uninterrupted one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from models.forwards import Forward, replaced

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOWERS = ("vision_model", "vision_tower")
"""What families call the tower, where an image is one row of its input."""


class FeatureCache:
    """Features [tokens, width] of images by number, the least recently used dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes, self.encoded = max_bytes, 0, 0
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def get(self, image: int) -> torch.Tensor | None:
        """The features, which are now the most recently used; None if they are not kept."""
        if image in self._kept:
            self._kept.move_to_end(image)
        return self._kept.get(image)

    def put(self, image: int, features: torch.Tensor) -> None:
        """Keep them, and drop others until all fit."""
        self.encoded += 1
        self._kept[image] = features
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes


def tower_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """The vision tower, if it is frozen and gives its last states only; else None, and nothing is kept."""
    backbone = model.base_model
    tower = next((getattr(backbone, name) for name in TOWERS if hasattr(backbone, name)), None)
    if tower is None or any(weight.requires_grad for weight in tower.parameters()):
        return None
    return None if hasattr(model.config, "vision_feature_layer") else tower


@contextmanager
def frozen_vision(model: PreTrainedModel, max_bytes: int) -> Iterator[FeatureCache]:
    """Within, a forward pass with `image_ids` (a tensor [images]) asks the tower only for images not kept.
    max_bytes: 0 to keep none, and to encode the images of a batch together."""
    cache, tower = FeatureCache(max_bytes), tower_of(model) if max_bytes else None
    asked: list[int] = []

    def remembering(read: Forward) -> Forward:
        def forward(*args: Any, image_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            asked[:] = [] if image_ids is None else image_ids.tolist()
            return read(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        stack.enter_context(replaced(model.base_model, remembering))
        if tower is not None:
            stack.enter_context(replaced(tower, lambda encode: _cached(encode, cache, asked)))
        yield cache


def _cached(encode: Forward, cache: FeatureCache, asked: list[int]) -> Forward:
    """The tower's forward; `asked` are the images that stand in its next rows."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def features(row: int, pixels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        kept = cache.get(asked[row])
        if kept is None:
            alone = slice(row, row + 1)
            own = {key: value[alone] if torch.is_tensor(value) else value for key, value in options.items()}
            with torch.no_grad():
                kept = encode(pixels[alone], **own).last_hidden_state[0]
            cache.put(asked[row], kept)
        return kept

    def forward(pixel_values: torch.Tensor, **options: Any) -> Any:
        if len(asked) != len(pixel_values):
            return encode(pixel_values, **options)
        rows = [features(row, pixel_values, options) for row in range(len(asked))]
        return BaseModelOutputWithPooling(last_hidden_state=torch.stack(rows))

    return forward
