"""transformers in this process: batched decoding with a KV cache, image features computed once an image.

    engine = LocalEngine.load("artifacts/foundation/generator")
    generate(engine, [Conversation(["images/a.png"], [("What is the sum of the top row?", "")])], Sampling())

Once everybody who can ask has asked, what waits is decoded in batches, prompts of like length together.
Samples of one prompt share its prefill; a prompt that goes on from an earlier one (the next step of a chain)
computes only what is new; rows that have ended leave the batch, so that a few long answers do not keep many
finished ones waiting. The same requests asked in the same order give the same texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.base import Completion, Reply, Request, Sampling
from models.families import positions
from models.images import ImageSource
from models.vlm import Encoder, load, pad, stack_pixels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from models.engines.kv_cache import Held, HeldConversations, RoomyCache

KEEP_SHARE = 0.85
"""Drop ended rows from the batch when fewer than this share of its rows still run."""
HELD_BYTES = 2 << 30
"""Most memory for keys and values of conversations that go on."""
QUIET_TURNS = 8
"""Turns of the event loop without a new request after which everybody is taken to have asked."""


class LocalEngine:
    """One model in this process. batch_size: rows decoded together."""

    independent = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        images: ImageSource | str | Path = "data",
        batch_size: int = 256,
    ) -> None:
        from models.engines.kv_cache import HeldConversations, Pool

        self.model = model.eval()
        self.encoder = Encoder(processor, images)
        self.capacity = batch_size
        self.end = processor.tokenizer.eos_token_id
        self.pad = processor.tokenizer.pad_token_id
        self.image_token = processor.image_token_id
        self.never: list[int] = []
        """Tokens that are not drawn."""
        self.pool = Pool()
        self._held = HeldConversations(HELD_BYTES)
        self._waiting: list[_Row] = []
        self._decoding: asyncio.Task[None] | None = None

    @classmethod
    def load(
        cls, checkpoint: str | Path, images: ImageSource | str | Path = "data", batch_size: int = 256
    ) -> LocalEngine:
        """An engine for a checkpoint folder."""
        model, processor = load(checkpoint)
        return cls(model, processor, images, batch_size)

    async def ask(self, request: Request) -> Reply:
        """Engine.ask."""
        if request.prompt.images:
            self.encoder.prepare(request.prompt.images)
        row = _Row(request, self.encoder.prompt(request.prompt), asyncio.get_running_loop().create_future())
        self._waiting.append(row)
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode_all())
        return await row.reply

    async def close(self) -> None:
        """Engine.close."""
        if self._decoding is not None:
            self._decoding.cancel()
            self._decoding = None
        self._waiting.clear()
        self._held.clear()

    async def _decode_all(self) -> None:
        import torch

        while self._waiting:
            await self._quiet()
            rows = self._next_batch()
            try:
                with torch.inference_mode():
                    _decode(self, rows)
            except Exception as error:
                for row in rows:
                    row.reply.set_exception(error)
                continue
            for row in rows:
                row.reply.set_result(self.completion(row))

    async def _quiet(self) -> None:
        """Until nobody asks any more."""
        quiet, asked = 0, len(self._waiting)
        while quiet < QUIET_TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == asked else 0
            asked = len(self._waiting)

    def _next_batch(self) -> list[_Row]:
        """The shortest of the waiting rows that are drawn as the first one is; and either all of them go on
        from what is held, or none does."""
        for row in self._waiting:
            row.meet(self._held)
        first = self._waiting[0]
        alike = [row for row in self._waiting if row.like(first)]
        rows = sorted(alike, key=lambda row: len(row.ids))[: self.capacity]
        taken = set(map(id, rows))
        self._waiting = [row for row in self._waiting if id(row) not in taken]
        return rows

    def completion(self, row: _Row) -> Completion:
        """What a decoded row came to."""
        return Completion(self.text(row), len(row.new), row.new[-1:] == [self.end], len(row.ids), row.known)

    def hold(self, rows: Sequence[_Row], cache: RoomyCache, cache_rows: torch.Tensor) -> None:
        """Keep what was computed for rows that have just ended, for the prompts that go on from them."""
        from models.engines.kv_cache import Held

        if not cache.can_hold or not any(row.request.goes_on for row in rows):
            return
        ids = [row.ids + row.said(self.end) for row in rows]
        fresh = cache.last(
            cache_rows, [len(all_of) - row.known for row, all_of in zip(rows, ids, strict=True)]
        )
        for row, all_of, part in zip(rows, ids, fresh, strict=True):
            if row.request.goes_on:
                begun = row.held.first(row.known) if row.held else []
                self._held.put(row.name(self.text(row)), Held(all_of, [*begun, part]))

    def text(self, row: _Row) -> str:
        """What was drawn for a row."""
        return str(self.encoder.tokenizer.decode(row.said(self.end), skip_special_tokens=False))


@dataclass(eq=False)
class _Row:
    """A request, the tokens of its prompt, where its reply goes; held: what its prompt begins with, of which
    `known` tokens need not be computed; new: the tokens drawn for it."""

    request: Request
    ids: list[int]
    reply: asyncio.Future[Reply]
    held: Held | None = None
    known: int = 0
    new: list[int] = field(default_factory=list)

    def meet(self, conversations: HeldConversations) -> None:
        """Look for what this prompt goes on from. One token at least is left to compute."""
        prompt = self.request.prompt
        self.held = conversations.get((tuple(prompt.images), tuple(prompt.turns[:-1])))
        self.known = min(self.held.shared(self.ids), len(self.ids) - 1) if self.held else 0

    def name(self, text: str) -> tuple[Any, ...]:
        """The conversation once `text` has been said."""
        prompt = self.request.prompt
        return tuple(prompt.images), (*prompt.turns[:-1], (prompt.turns[-1][0], text))

    def said(self, end: int) -> list[int]:
        """The new tokens without the one that ends them."""
        return self.new[:-1] if self.new[-1:] == [end] else self.new

    def like(self, other: _Row) -> bool:
        """Whether both can stand in one batch: drawn alike, and both go on or both begin."""
        mine, theirs = (replace(row.request.sampling, seed=0) for row in (self, other))
        return mine == theirs and (self.held is None) == (other.held is None)


def _decode(engine: LocalEngine, rows: Sequence[_Row]) -> None:
    """Draw the tokens of one batch."""
    import torch

    sampling, device = rows[0].request.sampling, engine.model.device
    state = _begin(engine, rows) if rows[0].held else _open(engine, rows)
    seeds = torch.tensor([row.request.sampling.seed for row in rows], device=device)
    running = torch.arange(len(rows), device=device)  # the request of each row of the cache
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    penalised = sampling.repetition_penalty != 1.0
    seen = pad([row.ids if penalised else [] for row in rows], engine.pad, left=True).to(device)
    for new in range(sampling.max_new_tokens):
        if engine.never:
            state.logits[:, engine.never] = -torch.inf
        chosen = _pick(state.logits, sampling, seeds, new, seen)
        over = (chosen == engine.end) & ~ended
        for row, token, done in zip(running.tolist(), chosen.tolist(), ended.tolist(), strict=True):
            if not done:
                rows[row].new.append(token)
        if bool(over.any()):
            engine.hold([rows[n] for n in running[over].tolist()], state.cache, over.nonzero().flatten())
        ended = ended | over
        if bool(ended.all()) or new + 1 == sampling.max_new_tokens:
            break
        if penalised:
            seen = torch.cat([seen, chosen[:, None]], dim=1)
        kept = (~ended).nonzero().squeeze(-1)
        if len(kept) < KEEP_SHARE * len(ended):
            state.keep(kept)
            running, ended, chosen, seeds, seen = (t[kept] for t in (running, ended, chosen, seeds, seen))
        state.feed(engine.model, chosen[:, None])
    state.cache.end()


@dataclass
class _State:
    """A batch under way. mask: [rows, tokens so far]; position: of the last token [rows, 1], or [3, rows, 1]
    where it is spatial; logits: of the next one [rows, vocabulary]."""

    cache: RoomyCache
    mask: torch.Tensor
    position: torch.Tensor
    logits: torch.Tensor

    def feed(self, model: PreTrainedModel, tokens: torch.Tensor) -> None:
        """One more token for each row."""
        import torch

        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.position = self.position + 1
        self.logits = _forward(model, self.cache, self.mask, self.position, {"input_ids": tokens})

    def keep(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position, self.logits = (
            self.mask[rows],
            self.position[..., rows, :],
            self.logits[rows],
        )


def _open(engine: LocalEngine, rows: Sequence[_Row]) -> _State:
    """Prefill of conversations that begin: equal prompts once."""
    import torch

    from models.engines.kv_cache import RoomyCache

    prompts, prompt_of = _distinct(rows)
    device = engine.model.device
    mask = pad([[1] * len(row.ids) for row in prompts], 0, left=True).to(device)
    pixels = stack_pixels(engine.encoder, [row.request.prompt.images for row in prompts])
    inputs = {"input_ids": pad([row.ids for row in prompts], engine.pad, left=True), **pixels}
    position = positions(engine.model, mask, inputs)
    cache = RoomyCache(engine.model.config, engine.pool)
    logits = _forward(engine.model, cache, mask, position, inputs)
    state = _State(cache, mask, position[..., -1:], logits)
    if len(prompts) < len(rows):  # the samples of a question go their own ways from here
        state.keep(torch.tensor(prompt_of, device=device))
    return state


def _begin(engine: LocalEngine, rows: Sequence[_Row]) -> _State:
    """Prefill of conversations that go on: the same number of tokens for each row, at least its new ones; so
    that padding stays on the left."""
    from models.engines.kv_cache import RoomyCache

    block = max(len(row.ids) - row.known for row in rows)
    device = engine.model.device
    begun = [(row.held, len(row.ids) - block) for row in rows if row.held]
    if min(count for _, count in begun) < 1 or any(engine.image_token in row.ids[-block:] for row in rows):
        for row in rows:
            row.known = 0
        return _open(engine, rows)
    cache = RoomyCache(engine.model.config, engine.pool)
    cache.begin(begun, block)
    mask = pad([[1] * len(row.ids) for row in rows], 0, left=True).to(device)
    whole = {"input_ids": pad([row.ids for row in rows], engine.pad, left=True)}
    if engine.encoder.family.spatial_positions:
        whole |= stack_pixels(engine.encoder, [row.request.prompt.images for row in rows])
    position = positions(engine.model, mask, whole)[..., -block:]
    logits = _forward(engine.model, cache, mask, position, {"input_ids": whole["input_ids"][:, -block:]})
    return _State(cache, mask, position[..., -1:], logits)


def _forward(
    model: PreTrainedModel,
    cache: RoomyCache,
    mask: torch.Tensor,
    position: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Logits [rows, vocabulary] after the last token."""
    return model(
        **{key: value.to(model.device) for key, value in inputs.items()},
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _distinct(rows: Sequence[_Row]) -> tuple[list[_Row], list[int]]:
    """The first row of every prompt, and for every row the number of its prompt among them."""
    numbers: dict[tuple[tuple[int, ...], tuple[str, ...]], int] = {}
    firsts: list[_Row] = []
    prompt_of: list[int] = []
    for row in rows:
        number = numbers.setdefault((tuple(row.ids), tuple(row.request.prompt.images)), len(firsts))
        if number == len(firsts):
            firsts.append(row)
        prompt_of.append(number)
    return firsts, prompt_of


def uniform(seeds: torch.Tensor, position: int) -> torch.Tensor:
    """A number in [0, 1) for each seed (int64) and position: splitmix64 (Steele et al., 2014), so that a
    row's draws do not depend on the rows beside it."""

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)  # >> copies the sign

    z = seeds + _signed((position + 1) * 0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return shifted(z ^ shifted(z, 31), 11).double() * 2.0**-53


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def _pick(
    logits: torch.Tensor, sampling: Sampling, seeds: torch.Tensor, position: int, seen: torch.Tensor
) -> torch.Tensor:
    """Next tokens [rows] from logits [rows, vocabulary]: greedy, or temperature and top-p at the draws that
    seeds [rows] and position give. seen: the tokens so far [rows, any], for the repetition penalty."""
    import torch

    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        score = logits.gather(1, seen)
        score = torch.where(
            score < 0, score * sampling.repetition_penalty, score / sampling.repetition_penalty
        )
        logits = logits.scatter(1, seen, score)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    cumulated = probabilities.double().cumsum(-1)
    draws = uniform(seeds, position)
    return torch.searchsorted(cumulated, draws[:, None] * cumulated[:, -1:], right=True).squeeze(-1)
