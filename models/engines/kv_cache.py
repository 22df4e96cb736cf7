"""A KV cache with room to grow: a new token is written in place, where transformers' own dynamic cache copies
everything that came before it at every step.

    cache = roomy_cache(model.config)
    model(**inputs, past_key_values=cache, use_cache=True)

and keys and values kept for conversations that go on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Held:
    """Keys and values [heads, tokens, width] of each layer for the tokens `ids` of one conversation."""

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens the conversation and `ids` begin with alike."""
        longest = min(len(self.ids), len(ids))
        if self.ids[:longest] == list(ids[:longest]):
            return longest
        return next(i for i in range(longest) if self.ids[i] != ids[i])


class HeldConversations:
    """What the model computed for conversations that may go on, up to `limit` bytes; the oldest go first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._held: OrderedDict[Hashable, Held] = OrderedDict()

    def get(self, conversation: Hashable) -> Held | None:
        """What is held for a conversation."""
        return self._held.get(conversation)

    def put(self, conversation: Hashable, held: Held) -> None:
        """Hold it, in place of what was held for the same conversation."""
        self._drop(conversation)
        self._held[conversation] = held
        self.size += held.size
        while self.size > self.limit:
            self._drop(next(iter(self._held)))

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self.size = 0

    def _drop(self, conversation: Hashable) -> None:
        if conversation in self._held:
            self.size -= self._held.pop(conversation).size


def row_of(cache: DynamicCache, row: int, ids: list[int]) -> Held:
    """What a cache holds for one of its rows, whose last tokens are `ids` (padding is on the left)."""
    count = len(ids)
    return Held(
        ids,
        [
            (layer.keys[row, :, -count:].clone(), layer.values[row, :, -count:].clone())
            for layer in cache.layers
        ],
    )


def begun_cache(config: Any, begun: Sequence[tuple[Held, int]]) -> DynamicCache:
    """A cache whose rows begin with the first tokens (each Held's number of them), padded on the left."""
    cache = roomy_cache(config)
    longest = max(count for _, count in begun)
    for number, layer in enumerate(cache.layers):
        sides = []
        for side in (0, 1):
            heads, _, width = begun[0][0].layers[number][side].shape
            states = begun[0][0].layers[number][side].new_zeros(len(begun), heads, longest, width)
            for row, (held, count) in enumerate(begun):
                states[row, :, longest - count :] = held.layers[number][side][:, :count]
            sides.append(states)
        layer.update(*sides)
    return cache


def can_hold(cache: DynamicCache) -> bool:
    """Whether a cache's rows can be taken out: not where layers forget tokens or keep another state."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)
