"""Reading records from files that nobody has checked: JSON lines or one JSON array, of any size.

    python -c "from models.record_files import read_rows; print(next(read_rows('data/records.jsonl')))"

Every record comes out as a Row: either its value or the reason why it has none. A bad line costs one record.
In a JSON array the records after a syntax error cannot be found again: the rest of the file is one bad row.
Memory holds one record at a time, also for an array.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

MAX_RECORD_BYTES = 2**20
"""Length allowed for one record, by default."""
CHUNK_BYTES = 2**16

NOT_JSON = "not JSON"
NOT_A_NUMBER = "NaN or infinite number"
NOT_UTF8 = "invalid UTF-8"
TOO_LONG = "record too long"
REASONS = (NOT_JSON, NOT_A_NUMBER, NOT_UTF8, TOO_LONG)


@dataclass(frozen=True)
class Row:
    """One record of a file. place: "name.jsonl:3" (line) or "name.json[3]" (item, counted from 0).

    Without a problem (one of REASONS, and its detail) `value` holds the parsed JSON. bytes_read: read so far.
    """

    place: str
    value: Any = None
    problem: str | None = None
    detail: str = ""
    bytes_read: int = 0


class _Infinite(ValueError):
    """NaN, Infinity or a number that overflows: Python reads them, JSON has none."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Infinite(f"{text[:20]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
_ANY_NUMBER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


def parse_json(text: str) -> Any:
    """Parse strictly: no NaN or Infinity. Raises ValueError, RecursionError (nested too deep)."""
    return _DECODER.decode(text)


def read_rows(path: str | Path, max_record_bytes: int = MAX_RECORD_BYTES) -> Iterator[Row]:
    """Rows of a file: a JSON array if it starts with "[", JSON lines otherwise, blank ones skipped."""
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        file.seek(0)
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        if start == b"[":
            yield from _items(file, path.name, max_record_bytes)
        else:
            yield from _lines(file, path.name, max_record_bytes)


def _lines(file: BinaryIO, name: str, limit: int) -> Iterator[Row]:
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        place = f"{name}:{number}"
        if len(line) > limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK_BYTES)
            yield Row(place, None, TOO_LONG, f"more than {limit:,} bytes", file.tell())
        elif line.strip():
            yield _parsed(place, line, file.tell())


def _parsed(place: str, line: bytes, bytes_read: int) -> Row:
    try:
        return Row(place, parse_json(line.decode("utf-8")), bytes_read=bytes_read)
    except Exception as error:
        return Row(place, None, *_problem(error), bytes_read)


def _problem(error: Exception) -> tuple[str, str]:
    if isinstance(error, UnicodeDecodeError):
        return NOT_UTF8, f"byte {error.start}"
    if isinstance(error, _Infinite):
        return NOT_A_NUMBER, str(error)
    if isinstance(error, RecursionError):
        return NOT_JSON, "nested too deep"
    return NOT_JSON, str(error)[:200]


def _items(file: BinaryIO, name: str, limit: int) -> Iterator[Row]:
    """Items of an array, decoded one by one from a buffer that never holds much more than one item."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, index, ended = "", 0, False
    before = "["  # what stands before the next item: the bracket, then commas
    while True:
        place = f"{name}[{index}]"
        try:
            row, text = _next_item(text.lstrip(), before, ended, place, limit)
        except _NeedMore:
            if len(text) > limit + CHUNK_BYTES:
                yield Row(
                    place, None, TOO_LONG, f"more than {limit:,} characters; rest not read", file.tell()
                )
                return
            try:
                chunk = file.read(CHUNK_BYTES)
                text, ended = text + decoder.decode(chunk, final=not chunk), not chunk
            except UnicodeDecodeError as error:
                yield Row(place, None, NOT_UTF8, f"{error.reason}; rest not read", file.tell())
                return
        except ValueError as error:
            yield Row(place, None, NOT_JSON, f"{error}; rest not read"[:200], file.tell())
            return
        else:
            if row is None:
                return
            yield replace(row, bytes_read=file.tell())
            index, before = index + 1, ","


class _NeedMore(Exception):
    """The buffer may end within an item."""


def _next_item(text: str, before: str, ended: bool, place: str, limit: int) -> tuple[Row | None, str]:
    """The row at the start of the text (None: the array ends here) and the text after it."""
    if text and text[0] not in (before, "]"):
        raise ValueError(f"expected {before!r}, found {text[0]!r}")
    body = text[1:].lstrip()
    if text.startswith("]") or (before == "[" and body.startswith("]")):
        return None, ""
    row = Row(place)
    try:
        try:
            value, end = _DECODER.raw_decode(body)
            row = replace(row, value=value)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number is wrong; where the item ends can still be found
            end = _ANY_NUMBER.raw_decode(body)[1]
            row = replace(row, problem=_problem(error)[0], detail=_problem(error)[1])
    except json.JSONDecodeError:
        if ended:
            raise
        raise _NeedMore from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if end == len(body) and not ended:  # a number may go on, and the comma is still to come
        raise _NeedMore
    if end > limit:
        row = Row(place, None, TOO_LONG, f"{end:,} characters")
    return row, body[end:]
