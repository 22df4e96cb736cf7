"""Record forms of imported data: one JSON value becomes questions, or a BadRecordError says why not.

    python -c "from models.record_forms import parse_record; print(parse_record({'id': 1, 'image': 'a.png',
        'question': 'How many?', 'answer': 2}))"

Two forms, told apart record by record: {id, image | images, question, answer} with optional {choices,
annotation, split, set, pool, family}, and LLaVA's {id, image | images, conversations: [{from: human | gpt,
value}, ...]}. A conversation of several turns gives one question a turn, `ID#1`, `ID#2`, ..., with up to
`context_turns` earlier turns in its text, because later turns refer to earlier ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models import images, record_files
from models.answers import option_index
from models.records import Question
from models.splits import SHARES

MISSING_FIELD = "missing field"
WRONG_TYPE = "wrong type"
EMPTY_QUESTION = "empty question"
EMPTY_ANSWER = "empty answer"
BAD_TEXT = "text not allowed"
DUPLICATE_ID = "duplicate id"
NOT_A_CHOICE = "answer not in choices"
TOKEN_MISMATCH = "image token count mismatch"
BAD_CONVERSATION = "conversation out of order"
UNKNOWN_VALUE = "unknown split or set"
TWO_SPLITS = "image in two splits"
REASONS = (
    MISSING_FIELD, WRONG_TYPE, EMPTY_QUESTION, EMPTY_ANSWER, BAD_TEXT, DUPLICATE_ID, NOT_A_CHOICE,
    TOKEN_MISMATCH, BAD_CONVERSATION, UNKNOWN_VALUE, TWO_SPLITS, *record_files.REASONS, *images.REASONS,
)  # fmt: skip

SPLITS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""Names accepted for a split, and the split."""
SETS = ("reasoning", "perception")
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
IMAGE_TOKEN = "<image>"
FIELDS = {"id", "image", "images", "question", "answer", "conversations", "choices", "annotation"}
FIELDS |= {"split", "set", "pool", "family"}

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?(?:image|video|s|thoughts|fake_token_around_image|global-img|end_of_utterance)>",
    re.I,
)
"""Tokens with a meaning of their own to models or stages; in a text they would be taken for the real ones."""


@dataclass(frozen=True)
class Rules:
    """Bounds of an import. Pixels and bytes of one image, bytes of one record, characters of one text."""

    max_pixels: int = images.MAX_PIXELS
    max_image_bytes: int = images.MAX_BYTES
    max_record_bytes: int = record_files.MAX_RECORD_BYTES
    max_chars: int = 20_000
    max_images: int = 16
    context_turns: int = 3
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))


class BadRecordError(ValueError):
    """A record that cannot be used, with a reason of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_record(value: Any, rules: Rules | None = None) -> list[Question]:
    """The questions of one record (a conversation of several turns gives several); split "" if it names none.

    Images are the names in the record. Raises BadRecordError.
    """
    rules = rules or Rules()
    if not isinstance(value, dict):
        raise BadRecordError(WRONG_TYPE, f"expected an object, found {type(value).__name__}")
    row = {key: item for key, item in value.items() if item is not None}
    identifier, names = _identifier(row), _image_names(row, rules)
    shared = {
        "split": _split(row),
        "set": _set(row),
        **{key: _optional(row, key, rules) for key in ("pool", "family")},
    }
    if "conversations" in row:
        turns = _turns(row["conversations"], len(names), rules)
        ids = (
            [identifier]
            if len(turns) == 1
            else [f"{identifier}#{number}" for number in range(1, len(turns) + 1)]
        )
        texts = [
            (_with_context(turns, number, rules.context_turns), answer)
            for number, (_, answer) in enumerate(turns)
        ]
    else:
        question, answer = (_text(row, key, rules) for key in ("question", "answer"))
        ids, texts = [identifier], [(_place_tokens([question], len(names))[0], answer)]
    questions = []
    for name, (question, answer) in zip(ids, texts, strict=True):
        _check_texts(question, answer)
        choices = _choices(row, rules)
        built = Question(id=name, images=list(names), question=question, answer=answer, **shared)  # type: ignore[arg-type]
        questions.append(
            replace(built, answer=_choice(answer, choices), choices=choices, annotation=_annotation(row))
        )
    return questions


def _identifier(row: Mapping[str, Any]) -> str:
    if "id" not in row:
        raise BadRecordError(MISSING_FIELD, "id")
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        raise BadRecordError(WRONG_TYPE, f"id is a {type(row['id']).__name__}")
    identifier = str(row["id"]).strip()
    if not identifier or len(identifier) > 200 or not identifier.isprintable():
        raise BadRecordError(BAD_TEXT, "id: 1 to 200 printable characters")
    return identifier


def _image_names(row: Mapping[str, Any], rules: Rules) -> list[str]:
    if "image" in row and "images" in row:
        raise BadRecordError(WRONG_TYPE, "both image and images")
    if "image" not in row and "images" not in row:
        raise BadRecordError(MISSING_FIELD, "image or images")
    value = row.get("image", row.get("images"))
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRecordError(WRONG_TYPE, "an image is named by its path in the folder")
    if not 0 < len(names) <= rules.max_images:
        raise BadRecordError(
            MISSING_FIELD if not names else WRONG_TYPE, f"{len(names)} images, 1 to {rules.max_images}"
        )
    return names


def _text(row: Mapping[str, Any], key: str, rules: Rules) -> str:
    """A text field, stripped; a number is its text. Refuses what could pass for a token or break a file."""
    if key not in row:
        raise BadRecordError(MISSING_FIELD, key)
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecordError(WRONG_TYPE, f"{key} is a {type(value).__name__}")
    text = str(value).strip()
    if len(text) > rules.max_chars:
        raise BadRecordError(BAD_TEXT, f"{key} has {len(text):,} characters, at most {rules.max_chars:,}")
    if _CONTROL.search(text) or any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRecordError(BAD_TEXT, f"{key} holds control characters or half a character")
    if special := _SPECIAL.search(text.replace(IMAGE_TOKEN, "")):
        raise BadRecordError(BAD_TEXT, f"{key} holds the token {special[0]}")
    return text


def _optional(row: Mapping[str, Any], key: str, rules: Rules) -> str | None:
    return _text(row, key, rules) if key in row else None


def _annotation(row: Mapping[str, Any]) -> dict[str, Any] | None:
    if not isinstance(row.get("annotation", {}), dict):
        raise BadRecordError(WRONG_TYPE, "annotation is not an object")
    try:
        json.dumps(row.get("annotation"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(BAD_TEXT, "annotation holds half a character") from error
    return row.get("annotation")


def _split(row: Mapping[str, Any]) -> str:
    """The split that a record names, "" if none."""
    split = row.get("split", "")
    if not isinstance(split, str) or split not in {"", *SPLITS}:
        raise BadRecordError(UNKNOWN_VALUE, f"split {str(split)[:50]!r}, known: {', '.join(SPLITS)}")
    return SPLITS.get(split, "")


def _set(row: Mapping[str, Any]) -> str:
    name = row.get("set", SETS[0])
    if name not in SETS:
        raise BadRecordError(UNKNOWN_VALUE, f"set {str(name)[:50]!r}, known: {', '.join(SETS)}")
    return name


def _choices(row: Mapping[str, Any], rules: Rules) -> list[str] | None:
    if "choices" not in row:
        return None
    if not isinstance(row["choices"], list):
        raise BadRecordError(WRONG_TYPE, "choices is not a list")
    choices = [_text({"choice": choice}, "choice", rules) for choice in row["choices"]]
    if not 2 <= len(choices) <= 26 or len(set(choices)) < len(choices) or "" in choices:
        raise BadRecordError(WRONG_TYPE, "choices are 2 to 26 different texts")
    return choices


def _choice(answer: str, choices: list[str] | None) -> str:
    """The answer, as the choice that it names by text or by letter."""
    if choices is None or answer in choices:
        return answer
    index = option_index(answer, choices)
    if index is None:
        raise BadRecordError(NOT_A_CHOICE, f"{answer[:80]!r}")
    return choices[index]


def _check_texts(question: str, answer: str) -> None:
    if not question:
        raise BadRecordError(EMPTY_QUESTION)
    if not answer:
        raise BadRecordError(EMPTY_ANSWER)
    if IMAGE_TOKEN in answer:
        raise BadRecordError(TOKEN_MISMATCH, f"{IMAGE_TOKEN} in an answer")


def _place_tokens(texts: list[str], count: int) -> list[str]:
    """Texts without image tokens: left out at both ends (images stand first anyway), else "(image 2)"."""
    found = sum(text.count(IMAGE_TOKEN) for text in texts)
    if found not in (0, count):
        raise BadRecordError(TOKEN_MISMATCH, f"{found} times {IMAGE_TOKEN} for {count} images")
    number = iter(range(1, count + 1))
    placed = []
    for text in texts:
        names = [f"(image {next(number)})" for _ in range(text.count(IMAGE_TOKEN))]
        body = re.sub(rf"^(?:\s*{IMAGE_TOKEN})+|(?:{IMAGE_TOKEN}\s*)+$", "", text)
        if IMAGE_TOKEN in body:
            body = re.sub(IMAGE_TOKEN, lambda _, left=iter(names): next(left), text)  # type: ignore[misc]
        placed.append(body.strip())
    return placed


def _turns(conversation: Any, count: int, rules: Rules) -> list[tuple[str, str]]:
    """(question, answer) of every turn: human and gpt, human first; a system message is left out."""
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        raise BadRecordError(WRONG_TYPE, "conversations is not a list of objects")
    messages = conversation[1:] if conversation and conversation[0].get("from") == "system" else conversation
    speakers = [SPEAKERS.get(str(message.get("from")), "") for message in messages]
    if not messages or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise BadRecordError(BAD_CONVERSATION, "human and gpt must take turns, human first, gpt last")
    texts = [_text(message, "value", rules) for message in messages]
    questions = _place_tokens(texts[::2], count)
    for question, answer in zip(questions, texts[1::2], strict=True):
        _check_texts(question, answer)
    return list(zip(questions, texts[1::2], strict=True))


def _with_context(turns: list[tuple[str, str]], number: int, context_turns: int) -> str:
    """A turn's question after the turns before it, each as two lines."""
    earlier = turns[max(0, number - context_turns) : number]
    lines = [f"Question: {question}\nAnswer: {answer}" for question, answer in earlier]
    return "\n".join([*lines, f"Question: {turns[number][0]}"]) if lines else turns[number][0]
