"""The records that travel between stages, and their one file format
(JSON lines, UTF-8, keys in written order).

python -c "from models.records import read_jsonl; print(next(read_jsonl('data/records.jsonl')))"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A record that does not have the agreed form; the message names file, line and field."""


@dataclass(frozen=True)
class Question:
    """One question about one or more images (METHOD: I, Q and the ground truth A)."""

    id: str
    images: list[str]
    question: str
    answer: str
    split: str = "train"
    set: str = "reasoning"
    pool: str | None = None
    family: str | None = None
    choices: list[str] | None = None
    annotation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """One reasoning step (Insight-V section 3.1): a short title,
    the detailed content, the action that follows."""

    title: str
    content: str
    next_action: str = "continue"


@dataclass(frozen=True)
class ReasoningPath:
    """One sampled chain R_1..R_n with its answer R_ans. `score` is the judge's 1-100,
    `right` the answer filter."""

    question_id: str
    sample: int
    steps: list[Step]
    text: str
    answer: str
    right: bool | None = None
    score: int | None = None
    oracle: dict[str, Any] | None = None


@dataclass(frozen=True)
class FailedPath:
    """A chain that could not be finished: counted and kept with its reason, never used as an answer."""

    question_id: str
    sample: int
    reason: str
    text: str = ""
    steps: list[Step] = field(default_factory=list)


def to_json(record: Any) -> dict[str, Any]:
    """A record as a plain dict: as dataclasses.asdict gives it, which takes its time over every string."""
    return dict(record) if isinstance(record, Mapping) else _plain(record)


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    return deepcopy(value)


_ATOMS = frozenset({str, int, float, bool, type(None)})


def write_jsonl(path: str | Path, records: Iterable[Any]) -> int:
    """Write records, one a line, and return how many. The file appears whole or not at all."""
    count = 0
    with jsonl_writer(path) as write:
        for record in records:
            write(record)
            count += 1
    return count


@contextmanager
def jsonl_writer(path: str | Path) -> Iterator[Callable[[Any], None]]:
    """write(record) adds a line; the file appears whole when the block has ended, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    try:
        with temporary.open("w", encoding="utf-8") as file:

            def write(record: Any) -> None:
                file.write(encode(to_json(record)) + "\n")

            yield write
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield each line as a dict; raises RecordError naming file and line
    where a line is not a JSON object."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise RecordError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield row


def _build(cls: Any, row: dict[str, Any], where: str) -> Any:
    known = cls.__dataclass_fields__
    missing = [
        name for name in ("id", "question_id", "question", "answer") if name in known and name not in row
    ]
    if missing:
        raise RecordError(f"{where}: missing {', '.join(missing)}")
    return cls(**{key: value for key, value in row.items() if key in known})


def read_questions(
    path: str | Path, *, split: str | None = None, set: str | None = None, pool: str | None = None
) -> list[Question]:
    """Questions of a records file, filtered; a record without a pool belongs to every pool."""
    rows = []
    for row in read_jsonl(path):
        question = _build(Question, row, str(path))
        if (split and question.split != split) or (set and question.set != set):
            continue
        if pool and question.pool not in (None, pool):
            continue
        rows.append(question)
    return rows


def read_paths(path: str | Path) -> list[ReasoningPath]:
    """Sampled chains of a paths.jsonl."""
    rows = []
    for row in read_jsonl(path):
        built = _build(ReasoningPath, row, str(path))
        rows.append(ReasoningPath(**{**built.__dict__, "steps": [Step(**step) for step in row["steps"]]}))
    return rows
