"""A vision-language checkpoint: loading, saving, and turning conversations into tensors.

    python -c "from models.vlm import load; model, processor = load('artifacts/foundation/base'); \
        print(type(model).__name__)"

A conversation is a list of turns (user text, assistant text) about one list of images, which stand before the
first user text: every chain and every sample of a question then shares the same prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.images import ImageSource, folder_images

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

IGNORE = -100
KEPT_TEXTS = 1 << 15
"""Texts whose tokens an encoder remembers: the turns of a chain are met again with each of its steps."""


class ImageTokenError(ValueError):
    """A prompt whose image tokens do not match its images; the model
    would answer without having seen them."""


@dataclass(frozen=True)
class Conversation:
    """Turns about some images. images: paths relative to the data root. turns: (user, assistant) texts."""

    images: Sequence[str]
    turns: Sequence[tuple[str, str]]


def load(
    checkpoint: str | Path, dtype: str = "float32", revision: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (eval mode) and processor of a checkpoint folder or a hub id at a
    pinned revision; safetensors only."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": revision} if revision else {}
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, backend="pil", **options)
    return model.eval(), processor


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> None:
    """An ordinary Hugging Face checkpoint with nothing in it that changes from run to run."""
    from transformers import logging

    logging.disable_progress_bar()
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
    or the folder their paths are relative to. cache: most images kept as tensors.
    """

    def __init__(
        self, processor: ProcessorMixin, images: ImageSource | str | Path = "data", cache: int = 8192
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._open = images if callable(images) else folder_images(images)
        self._pixels = lru_cache(maxsize=cache)(self._process_images)
        self._tokens = lru_cache(maxsize=KEPT_TEXTS)(self._tokenize)
        special = [str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._expanded: str | None = None
        self._tokens_per_image = 0
        self._frames: dict[tuple[int, int, bool], list[str]] = {}

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and labels; labels are IGNORE except on assistant texts and the token that ends them."""
        closed = bool(conversation.turns[-1][1])
        frame = self._frame(len(conversation.images), len(conversation.turns), closed)
        ids: list[int] = []
        labels: list[int] = []
        for index, (user, assistant) in enumerate(conversation.turns):
            asked = self._tokens(user, frame[2 * index], frame[2 * index + 1])
            said = self.answer_ids(assistant) if assistant else []
            ids += [*asked, *said]
            labels += [IGNORE] * len(asked) + said
        self._check(ids, conversation.images)
        return ids, labels

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the assistant is to go on. The last turn's answer must be empty."""
        if conversation.turns[-1][1]:
            raise ValueError("the last turn of a prompt must be open (empty answer)")
        return self.encode(conversation)[0]

    def answer_ids(self, text: str, goes_on: bool = False) -> list[int]:
        """An assistant text as it stands in a conversation: its tokens and, unless it goes on,
        the end of turn."""
        tokens = self._tokens(text)
        return [*tokens] if goes_on else [*tokens, self.tokenizer.eos_token_id]

    def pixels(self, images: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The processor's image tensors of one conversation, e.g.
        pixel_values [1, images, 3, height, width]."""
        return self._pixels(tuple(images)) if images else {}

    def _tokenize(self, text: str, before: str = "", after: str = "") -> tuple[int, ...]:
        """Tokens of a text between two pieces of the chat template."""
        text = before + self._plain(text) + after
        if self.tokenizer.is_fast:  # a tenth of the time of the call that makes a BatchEncoding
            return tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _plain(self, text: str) -> str:
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
            if images:
                text = text.replace(self.processor.image_token, self._placeholder())
            parts = re.split("\u27e6[ua]\\d+\u27e7", text)
            end = self.tokenizer.eos_token
            if any(not part.startswith(end) for i, part in enumerate(parts) if i and i % 2 == 0 and part):
                raise ValueError(
                    f"the chat template does not end the assistant's turns with {end}, the end token"
                )
            self._frames[key] = [
                part.removeprefix(end) if i and i % 2 == 0 else part for i, part in enumerate(parts)
            ]
        return self._frames[key]

    def _placeholder(self) -> str:
        if self._expanded is None:
            raise ImageTokenError("call `prepare` with the images of one conversation before encoding any")
        return self._expanded

    def prepare(self, images: Sequence[str]) -> None:
        """Learn from one image what the processor puts in place of an image placeholder
        (one image size a checkpoint)."""
        if self._expanded is None and images:
            out = self.processor(text=[self.processor.image_token], images=[[self._open(images[0])]])
            ids = list(out["input_ids"][0])
            self._expanded = self.tokenizer.decode(ids, skip_special_tokens=False)
            self._tokens_per_image = ids.count(self.processor.image_token_id)
            if not self._tokens_per_image:
                raise ImageTokenError(
                    f"the processor puts no {self.processor.image_token!r} in place of an image: the model "
                    "would answer without having seen it. Is this a checkpoint with vision?"
                )

    def _process_images(self, images: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
        pictures = [self._open(path) for path in images]
        features = self.processor.image_processor([pictures], return_tensors="pt")
        kept = {"pixel_values", "image_grid_thw", "image_sizes"}
        return {key: value for key, value in features.items() if key in kept}

    def _check(self, ids: list[int], images: Sequence[str]) -> None:
        """Image tokens equal images (METHOD 1.5): as many as the processor gives each image."""
        found, wanted = ids.count(self.processor.image_token_id), len(images) * self._tokens_per_image
        if found != wanted:
            raise ImageTokenError(f"{len(images)} images need {wanted} image tokens, the prompt has {found}")


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

    Where rows have different numbers of images ([1, images, 3, height, width]), all stand in one row: these
    models hand image features out in order.
    """
    import torch

    parts = [encoder.pixels(row) for row in images if row]
    joined = {}
    for key in parts[0] if parts else ():
        tensors = [part[key] for part in parts]
        images_second = tensors[0].ndim == 5 and "image_sizes" not in parts[0]
        uneven = images_second and len({tensor.shape[1] for tensor in tensors}) > 1
        joined[key] = torch.cat(tensors, dim=1 if uneven else 0)
    return joined
