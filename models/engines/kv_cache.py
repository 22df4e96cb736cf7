"""A KV cache with room to grow: a new token is written in place, where transformers' own dynamic cache copies
everything that came before it at every step.

    cache = RoomyCache(model.config, Pool())
    model(**inputs, past_key_values=cache, use_cache=True)

and keys and values kept for conversations that go on.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    import torch

ROOM = 32
"""Tokens of spare room at every allocation."""
SPARE = 1.25
"""Memory is taken for so much more than is asked for: prompts grow from step to step."""


class Pool:
    """Memory that batches use one after the other: on a CPU fresh pages cost more than writing to them."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, shape: Sequence[int], like: torch.Tensor) -> Block:
        """Room for a tensor of this shape, of the type of `like`; what it holds is undefined."""
        wanted = math.prod(shape)
        kind = (like.dtype, like.device)
        fits = [flat for flat in self._free if (flat.dtype, flat.device) == kind and len(flat) >= wanted]
        if fits:
            flat = min(fits, key=len)
            self._free = [other for other in self._free if other is not flat]
        else:
            self._free.clear()
            flat = like.new_empty(int(wanted * SPARE))
        return Block(flat, flat[:wanted].view(*shape))

    def give_back(self, block: Block) -> None:
        """Nobody looks at it any more."""
        self._free.append(block.flat)


@dataclass(frozen=True, eq=False)
class Block:
    """A tensor in memory of a pool."""

    flat: torch.Tensor
    tensor: torch.Tensor


class RoomyCache(DynamicCache):
    """Keys and values of all layers in one block [layers, 2, rows, heads, tokens, width] with spare room for
    tokens. Layers that forget tokens, keep another state or differ in shape stay transformers' own."""

    layers: list[Any]

    def __init__(self, config: Any, pool: Pool) -> None:
        super().__init__(config=config.get_text_config())
        self._pool = pool
        self._block: Block | None = None
        self.layers = [
            _RoomyLayer(self, number) if type(layer) is DynamicLayer else layer
            for number, layer in enumerate(self.layers)
        ]

    @property
    def states(self) -> torch.Tensor:
        """[layers, 2, rows, heads, tokens, width], spare room included."""
        assert self._block is not None
        return self._block.tensor

    @property
    def can_hold(self) -> bool:
        """Whether rows can be taken out of it."""
        return all(isinstance(layer, _RoomyLayer) and layer.in_block for layer in self.layers)

    def fits(self, like: torch.Tensor) -> bool:
        """Whether states of this shape [rows, heads, tokens, width] can stand in the block."""
        return self._block is None or self.states.shape[2:4] + self.states.shape[5:] == (
            *like.shape[:2],
            *like.shape[3:],
        )

    def make_room(self, like: torch.Tensor, tokens: int) -> None:
        """Room for so many tokens of rows like these [rows, heads, any, width]; what is held stays."""
        held = self._block
        if held is not None and held.tensor.shape[-2] >= tokens:
            return
        rows, heads, _, width = like.shape
        self._block = self._pool.take((len(self.layers), 2, rows, heads, tokens + ROOM, width), like)
        if held is not None:
            self.states[..., : held.tensor.shape[-2], :] = held.tensor
            self._pool.give_back(held)

    def begin(self, rows: Sequence[tuple[Held, int]], room: int) -> None:
        """Hold for each row the first so many tokens of a conversation, padded on the left; with room for
        `room` more."""
        longest = max(count for _, count in rows)
        first = rows[0][0].parts[0]
        like = first.new_empty(len(rows), first.shape[2], 0, first.shape[4])
        self.make_room(like, longest + room)
        self.states[..., : longest - min(count for _, count in rows), :] = 0
        for row, (held, count) in enumerate(rows):
            at = longest - count
            for part in held.first(count):
                end = at + part.shape[-2]
                self.states[:, :, row, :, at:end] = part
                at = end
        for layer in self.layers:
            layer.lazy_initialization(like, like)
            layer.view(longest)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep (or repeat) the rows `indices`."""
        import torch

        held = self._block
        if held is not None:
            layers, sides, _, *shape = held.tensor.shape
            self._block = self._pool.take((layers, sides, len(indices), *shape), held.tensor)
            torch.index_select(held.tensor, 2, indices, out=self.states)
            self._pool.give_back(held)
        for layer in self.layers:
            if isinstance(layer, _RoomyLayer) and layer.in_block:
                layer.view(layer.get_seq_length())
            else:
                layer.batch_select_indices(indices)

    def last(self, rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """The last so many tokens of some rows: [layers, 2, heads, tokens, width] each."""
        longest, length = max(counts), self.get_seq_length()
        states = self.states[..., length - longest : length, :].index_select(2, rows)
        return [states[:, :, number, :, longest - count :] for number, count in enumerate(counts)]

    def end(self) -> None:
        """Give the memory back: nobody looks at it any more."""
        if self._block is not None:
            self._pool.give_back(self._block)
            self._block = None


class _RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width] of one layer as views into the cache's block."""

    def __init__(self, cache: RoomyCache, number: int) -> None:
        super().__init__()
        self._cache, self._number = cache, number
        self.in_block = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new states and return all of them."""
        self.in_block = self.in_block and key_states.shape == value_states.shape
        self.in_block = self.in_block and self._cache.fits(key_states)
        if not self.in_block:
            return super().update(key_states, value_states, *args, **kwargs)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        self._cache.make_room(key_states, new)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for side, states in zip(self._cache.states[self._number], (key_states, value_states), strict=True):
            side[:, :, old:new] = states
        self.view(new)
        return self.keys, self.values

    def view(self, tokens: int) -> None:
        """So many tokens of the block."""
        self.keys, self.values = self._cache.states[self._number, ..., :tokens, :]


@dataclass(frozen=True)
class Held:
    """Keys and values for the tokens `ids` of one conversation: one after the other, parts
    [layers, 2, heads, tokens, width], of which it may share the first with what it goes on from."""

    ids: list[int]
    parts: list[torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def first(self, tokens: int) -> list[torch.Tensor]:
        """The parts of the first so many tokens."""
        parts, left = [], tokens
        for part in self.parts:
            if left <= 0:
                break
            parts.append(part[..., :left, :])
            left -= part.shape[-2]
        return parts

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
