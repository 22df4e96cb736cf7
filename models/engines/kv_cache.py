"""A KV cache with room to grow: a new token is written in place, where transformers' own dynamic cache copies
everything that came before it at every step.

    cache = roomy_cache(model.config)
    model(**inputs, past_key_values=cache, use_cache=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    import torch

ROOM = 64
"""Tokens of spare room at every allocation."""


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width] as views into buffers with spare room along the tokens."""

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new states and return all of them."""
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._buffers is None or new > self._buffers[0].shape[-2]:
            self._buffers = (
                self._grown(self.keys, key_states, new),
                self._grown(self.values, value_states, new),
            )
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self._view(new)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep (or repeat) the rows `indices`."""
        if self._buffers is None:
            return
        keys, values = self._buffers
        length = self.get_seq_length()
        self._buffers = keys[indices], values[indices]
        self._view(length)

    def _grown(self, held: torch.Tensor | None, states: torch.Tensor, tokens: int) -> torch.Tensor:
        rows, heads, _, width = states.shape
        buffer = states.new_empty(rows, heads, tokens + ROOM, width)
        if held is not None and held.numel():
            buffer[:, :, : held.shape[-2]] = held
        return buffer

    def _view(self, tokens: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)


def roomy_cache(config: Any) -> DynamicCache:
    """A dynamic cache whose plain layers have room to grow; sliding-window layers stay transformers' own."""
    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
