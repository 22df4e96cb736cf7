"""A vision-language checkpoint: loading, saving, and turning conversations into tensors.

    python -c "from models.vlm import load; model, processor = load('artifacts/foundation/base'); \
        print(type(model).__name__)"

A conversation is a list of turns (user text, assistant text) about one list of images, which stand before the
first user text: every chain and every sample of a question then shares the same prefix.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.adapter_base import base_of, is_adapter, note_base
from models.families import of_model, of_processor
from models.images import ImageSource, folder_images

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

IGNORE = -100
KEPT_TEXTS = 1 << 15
"""Texts whose tokens an encoder remembers: the turns of a chain are met again with each of its steps."""
KEPT_BYTES = 4 << 30
"""Most memory for images kept as tensors: one that is cut into five tiles takes 7 MB."""


class ImageTokenError(ValueError):
    """A prompt whose image tokens do not match its images; the model
    would answer without having seen them."""


@dataclass(frozen=True)
class Conversation:
    """Turns about some images. images: paths relative to the data root. turns: (user, assistant) texts."""

    images: Sequence[str]
    turns: Sequence[tuple[str, str]]


def quiet() -> None:
    """No progress bars of single files, and no word of transformers on the padding token of a config that it
    builds of defaults at every load and save."""
    from transformers import logging as transformers

    transformers.disable_progress_bar()
    logging.getLogger("transformers.configuration_utils").addFilter(_not_of_defaults)


def _not_of_defaults(record: logging.LogRecord) -> bool:
    return "Model config: pad_token_id must be" not in record.getMessage()


def load(
    checkpoint: str | Path, dtype: str = "float32", revision: str | None = None, **options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (eval mode) and processor of a checkpoint folder or a hub id at a pinned revision; safetensors
    only. A folder with a LoRA adapter is loaded with the base that it names, merged. options: for
    transformers' from_pretrained.

    Raises FamilyError for a model of no family that is known (models.families), BaseChangedError for an
    adapter whose base is another one now.
    """
    from transformers import AutoModelForImageTextToText

    quiet()
    options |= {"revision": revision} if revision else {}
    if is_adapter(checkpoint):
        from peft import PeftModel

        base, _ = load(base_of(checkpoint), dtype, **options)
        model = PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload()
    else:
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    of_model(model)
    return model.eval(), load_processor(checkpoint, revision)


def load_processor(checkpoint: str | Path, revision: str | None = None) -> ProcessorMixin:
    """The processor of a checkpoint, in the form that the rest reads (Family.settle)."""
    from transformers import AutoProcessor

    options = {"revision": revision} if revision else {}
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, backend="pil", **options)
    of_processor(processor).settle(processor)
    return processor


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> None:
    """An ordinary Hugging Face checkpoint with nothing in it that changes from run to run; of a model with an
    adapter, the adapter."""
    quiet()
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        note_base(folder)
    else:
        model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    for volatile in ("training_args.bin", "README.md"):
        (Path(folder) / volatile).unlink(missing_ok=True)


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as chat messages, images first; a last turn with an empty answer is left open."""
    chat: list[dict[str, Any]] = []
    for index, (user, assistant) in enumerate(conversation.turns):
        images = [{"type": "image"} for _ in conversation.images] if index == 0 else []
        chat.append({"role": "user", "content": [*images, {"type": "text", "text": user}]})
        if assistant:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
    return chat


class Encoder:
    """Conversations to token ids and image tensors with one processor; every image is processed once.

    images: where pictures come from by name (models.images.folder_images and its relatives),
    or the folder their paths are relative to. cache: most images kept as tensors; they also keep within
    KEPT_BYTES.
    """

    def __init__(
        self, processor: ProcessorMixin, images: ImageSource | str | Path = "data", cache: int = 8192
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.family = of_processor(processor)
        self.open = images if callable(images) else folder_images(images)
        self._pixels = _Kept(cache, self._process_images)
        self._placeholder = lru_cache(maxsize=KEPT_TEXTS)(self._find_placeholder)
        self._tokens = lru_cache(maxsize=KEPT_TEXTS)(self._tokenize)
        special = [str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._one_length = self.family.one_length(processor)
        self._by_size: dict[tuple[int, int], tuple[int, ...]] = {}
        self._frames: dict[tuple[int, int, bool], list[str]] = {}
        self._lead: str | None = None

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and labels; labels are IGNORE except on assistant texts and the token that ends them."""
        closed = bool(conversation.turns[-1][1])
        frame = self._frame(len(conversation.images), len(conversation.turns), closed)
        ids: list[int] = []
        labels: list[int] = []
        for index, (user, assistant) in enumerate(conversation.turns):
            asked = self._tokens(user, frame[2 * index], frame[2 * index + 1])
            if index == 0:
                asked = self._with_images(asked, conversation.images)
            said = self.answer_ids(assistant) if assistant else []
            ids += [*asked, *said]
            labels += [IGNORE] * len(asked) + said
        return ids, labels

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the assistant is to go on. The last turn's answer must be empty."""
        if conversation.turns[-1][1]:
            raise ValueError("the last turn of a prompt must be open (empty answer)")
        return self.encode(conversation)[0]

    def answer_ids(self, text: str, goes_on: bool = False) -> list[int]:
        """An assistant text as it stands in a conversation: its tokens and, unless it goes on,
        the end of turn."""
        tokens = self._tokens(text if text.startswith(self.lead) else self.lead + text)
        return [*tokens] if goes_on else [*tokens, self.tokenizer.eos_token_id]

    def pixels(self, images: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The processor's image tensors of one conversation, e.g.
        pixel_values [1, images, 3, height, width]."""
        return self._pixels(tuple(images)) if images else {}

    def _tokenize(self, text: str, before: str = "", after: str = "") -> tuple[int, ...]:
        """Tokens of a text between two pieces of the chat template."""
        text = before + self.plain(text) + after
        if self.tokenizer.is_fast:  # a tenth of the time of the call that makes a BatchEncoding
            return tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def plain(self, text: str) -> str:
        """A text in which no special token can be read: a user's or a model's `<image>` is no image."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def _frame(self, images: int, turns: int, closed: bool) -> list[str]:
        """What the chat template puts around the texts: before and after
        every user text, ends of turn left out.

        The template is rendered once for each shape of conversation, with marks in place of the texts.
        """
        key = (images, turns, closed)
        if key not in self._frames:
            marks = [(f"\u27e6u{i}\u27e7", f"\u27e6a{i}\u27e7") for i in range(turns)]
            if not closed:
                marks[-1] = (marks[-1][0], "")
            text = self.tokenizer.apply_chat_template(
                messages(Conversation([""] * images, marks)),
                tokenize=False,
                add_generation_prompt=not closed,
                chat_template=self.processor.chat_template,
            )
            parts = re.split("\u27e6[ua]\\d+\u27e7", text)
            end = self.tokenizer.eos_token
            if any(not part.startswith(end) for i, part in enumerate(parts) if i and i % 2 == 0 and part):
                raise ValueError(
                    f"the chat template does not end the assistant's turns with {end}, the end token"
                )
            pieces = [part.removeprefix(end) if i and i % 2 == 0 else part for i, part in enumerate(parts)]
            for i in range(1, 2 * turns if closed else 2 * turns - 2, 2):
                pieces[i] = pieces[i].removesuffix(self.lead)
            self._frames[key] = pieces
        return self._frames[key]

    @property
    def lead(self) -> str:
        """White space before an answer that the chat template leaves to the model to write: `Assistant:` asks
        for ` yes`, and a conversation holds `Assistant: yes`."""
        if self._lead is None:
            self._lead = ""
            asked, answered = (self._frame(0, 1, closed)[1] for closed in (False, True))
            if not answered.startswith(asked) or answered.removeprefix(asked).strip():
                raise ValueError(
                    f"the chat template writes {answered!r} before an answer but asks for one with {asked!r}"
                )
            self._lead = answered.removeprefix(asked)
            self._frames.clear()
        return self._lead

    def prepare(self, images: Sequence[str]) -> None:
        """Learn from one image what the processor puts in place of any, where their size does not matter."""
        if self._one_length and not self._by_size and images:
            self._by_size[0, 0] = self._expanded(images[0])

    def _with_images(self, ids: Sequence[int], images: Sequence[str]) -> tuple[int, ...]:
        """The ids with what stands for each image in place of its one token: image tokens equal images
        (METHOD 1.5)."""
        token = self.processor.image_token_id
        found = ids.count(token)
        if found != len(images):
            raise ImageTokenError(f"the chat template has {found} places for {len(images)} images")
        names = iter(images)
        parts = (self._placeholder(next(names)) if one == token else (one,) for one in ids)
        return tuple(one for part in parts for one in part) if images else tuple(ids)

    def _find_placeholder(self, image: str) -> tuple[int, ...]:
        """The tokens that stand for an image; they depend on its size alone."""
        if self._one_length:
            if not self._by_size:
                raise ImageTokenError(
                    "call `prepare` with the images of one conversation before encoding any"
                )
            return self._by_size[0, 0]
        size = self.open(image).size
        if size not in self._by_size:
            self._by_size[size] = self._expanded(image)
        return self._by_size[size]

    def _expanded(self, image: str) -> tuple[int, ...]:
        out = self.processor(
            text=[self.processor.image_token], images=[[self.open(image)]], add_special_tokens=False
        )
        ids = tuple(out["input_ids"][0])
        if self.processor.image_token_id not in ids:
            raise ImageTokenError(
                f"the processor puts no {self.processor.image_token!r} in place of an image: the model "
                "would answer without having seen it. Is this a checkpoint with vision?"
            )
        return ids

    def _process_images(self, images: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
        pictures = [self.open(path) for path in images]
        features = self.processor.image_processor([pictures], return_tensors="pt")
        kept = {"pixel_values", "image_grid_thw", "image_sizes"}
        return {key: value for key, value in features.items() if key in kept}


class _Kept:
    """The tensors of the images last asked for: at most `count` of them, and KEPT_BYTES."""

    def __init__(self, count: int, make: Callable[[tuple[str, ...]], Mapping[str, torch.Tensor]]) -> None:
        self._count, self._make, self._bytes = count, make, 0
        self._items: OrderedDict[tuple[str, ...], Mapping[str, torch.Tensor]] = OrderedDict()

    def __call__(self, images: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
        if images not in self._items:
            self._items[images] = self._make(images)
            self._bytes += _size(self._items[images])
        self._items.move_to_end(images)
        found = self._items[images]
        while len(self._items) > self._count or self._bytes > KEPT_BYTES:
            self._bytes -= _size(self._items.popitem(last=False)[1])
        return found


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> torch.Tensor:
    """Rows of unequal length as one int64 tensor [rows, longest]."""
    import torch

    longest = max(len(row) for row in rows)
    padded = [
        [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long)


def stack_pixels(encoder: Encoder, images: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
    """Image tensors of a batch: concatenated along the first axis, as processors of these families do.

    Where rows have different numbers of images or tiles ([1, images, 3, height, width]), all stand in one
    row: these models hand image features out in order. With `image_sizes`, [images, tiles, 3, height, width],
    they are padded to the most tiles.
    """
    import torch

    parts = [encoder.pixels(row) for row in images if row]
    joined = {}
    for key in parts[0] if parts else ():
        tensors = [part[key] for part in parts]
        uneven = tensors[0].ndim == 5 and len({tensor.shape[1] for tensor in tensors}) > 1
        if uneven and "image_sizes" in parts[0]:
            most = max(tensor.shape[1] for tensor in tensors)
            tensors = [
                torch.nn.functional.pad(tensor, (0,) * 7 + (most - tensor.shape[1],)) for tensor in tensors
            ]
            uneven = False
        joined[key] = torch.cat(tensors, dim=1 if uneven else 0)
    return joined
