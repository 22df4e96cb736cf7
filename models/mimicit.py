"""MIMIC-IT files (METHOD 2.1): instructions.json, train.json and images as base64 in JSON or parquet.

    python -c "from models.mimicit import read_folder; print(read_folder('artifacts/instruct').summary())"

    instructions.json   {"meta": {"version", "time", "author"},
                         "data": {ID: {"instruction", "answer", "image_ids": [...], "rel_ins_ids": [...]}}}
    train.json          {ID: [related IDs]}: what is trained on; replaces rel_ins_ids
    images.json         {image ID: base64}, or images.parquet: index image_id, column base64

Writing is strict and gives the same bytes for the same content: sorted by ID, the time passed in by the
caller. Reading is lenient, as published files are not clean (dangling IDs, other base64 alphabets): what
cannot be used is left out and kept as a Problem. Images in parquet are read when asked for, by row group.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.base64_images import JsonImages, MimicItError, ParquetImages, encode_base64, write_parquet_images
from models.images import ImageError, inspect_image
from models.vlm import Conversation

NOT_AN_ENTRY = "not an entry"
NO_IMAGE = "no image"
DANGLING_IMAGE = "image id not found"
DANGLING_RELATED = "related id not found"
DANGLING_TRAIN = "train id not found"
DUPLICATE = "duplicate id"
BAD_IMAGE = "image unusable"


@dataclass(frozen=True)
class Instruction:
    """One instruction-response pair, its images, and the pairs that serve as in-context examples."""

    id: str
    instruction: str
    answer: str
    image_ids: list[str]
    rel_ins_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Meta:
    """version and author of a set, and its time, fixed by the caller so that the bytes do not change."""

    version: str
    time: str
    author: str


@dataclass(frozen=True)
class Problem:
    """Something left out while reading: in which entry, for which reason, about which id."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class MimicIt:
    """A set as read. train_ids: what is trained on, in file order (everything, without train.json).

    Ids in `train_ids` and in any `rel_ins_ids` are keys of `instructions`; image ids are keys of `images`.
    """

    meta: Meta
    instructions: dict[str, Instruction]
    images: Mapping[str, bytes]
    train_ids: list[str]
    problems: list[Problem]

    def context(self, identifier: str) -> list[Instruction]:
        """The in-context examples of an instruction, in order (C of METHOD 2.1)."""
        return [self.instructions[name] for name in self.instructions[identifier].rel_ins_ids]

    def summary(self) -> dict[str, int]:
        """Counts: instructions, images, training entries, and problems by reason."""
        counts = {"instructions": len(self.instructions), "images": len(self.images)}
        counts["train"] = len(self.train_ids)
        return counts | dict(sorted(Counter(problem.reason for problem in self.problems).items()))


# Writing ----------------------------------------------------------------------


def write_folder(
    folder: str | Path,
    instructions: Sequence[Instruction],
    images: Mapping[str, bytes],
    meta: Meta,
    train_ids: Sequence[str] | None = None,
    *,
    image_format: str = "parquet",
) -> None:
    """Write the three files of a set; the same content gives the same bytes. images: id -> bytes of a file.

    `images` is read one at a time, so it may be lazy. train_ids: None for all. Raises MimicItError on
    duplicate ids and on ids that point to nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row.id: row for row in sorted(instructions, key=lambda row: row.id)}
    trained = sorted(rows if train_ids is None else train_ids)
    _require_whole(rows, len(instructions), images, trained)
    data = {name: {key: getattr(row, key) for key in _ENTRY} for name, row in rows.items()}
    _write_json(folder / "instructions.json", {"meta": meta.__dict__, "data": data})
    _write_json(folder / "train.json", {name: rows[name].rel_ins_ids for name in trained})
    if image_format == "parquet":
        write_parquet_images(folder / "images.parquet", images)
    elif image_format == "json":
        _write_json(folder / "images.json", {name: encode_base64(images[name]) for name in sorted(images)})
    else:
        raise MimicItError(f"image_format is parquet or json, not {image_format!r}")


_ENTRY = ("instruction", "answer", "image_ids", "rel_ins_ids")


def _require_whole(
    rows: Mapping[str, Instruction], count: int, images: Mapping[str, bytes], trained: Sequence[str]
) -> None:
    if len(rows) < count:
        raise MimicItError(f"{count - len(rows)} instructions have the id of another")
    if strange := [name for name in trained if name not in rows]:
        raise MimicItError(f"train ids without an instruction: {strange[:3]}")
    for row in rows.values():
        if lost := [name for name in row.image_ids if name not in images]:
            raise MimicItError(f"{row.id}: no image {lost[:3]}")
        if lost := [name for name in row.rel_ins_ids if name not in rows]:
            raise MimicItError(f"{row.id}: no related instruction {lost[:3]}")


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
    temporary.replace(path)


# Reading ----------------------------------------------------------------------


def read_folder(folder: str | Path) -> MimicIt:
    """A set under the names that write_folder gives, with images.parquet or images.json."""
    folder = Path(folder)
    images = next(
        (path for name in ("images.parquet", "images.json") if (path := folder / name).is_file()), None
    )
    if images is None:
        raise MimicItError(f"{folder}: neither images.parquet nor images.json")
    train = folder / "train.json"
    return read_set(folder / "instructions.json", images, train if train.is_file() else None)


def read_set(
    instructions: str | Path, images: str | Path, train: str | Path | None = None, *, decode: bool = False
) -> MimicIt:
    """A set from files of any names. Raises MimicItError only if a whole file is not what it should be.

    decode: read every image now, so that a broken one costs its entries here and not its reader later.
    """
    problems: list[Problem] = []
    store = open_images(images, problems)
    usable = _decodable(store, problems) if decode else store
    document = _read_object(Path(instructions), problems)
    data, meta = document.get("data"), document.get("meta")
    if not isinstance(data, dict):
        raise MimicItError(f'{instructions}: no "data" object')
    meta = meta if isinstance(meta, dict) else {}
    rows = {name: row for name, entry in data.items() if (row := _entry(name, entry, usable, problems))}
    trained = list(rows)
    if train is not None:
        related = _read_object(Path(train), problems)
        trained = [name for name in related if name in rows]
        problems += [Problem(name, DANGLING_TRAIN) for name in related if name not in rows]
        rows |= {name: replace(rows[name], rel_ins_ids=_names(related[name]) or []) for name in trained}
    rows = {name: replace(row, rel_ins_ids=_related(row, rows, problems)) for name, row in rows.items()}
    fields = {key: str(meta.get(key, "")) for key in ("version", "time", "author")}
    return MimicIt(Meta(**fields), rows, store, trained, problems)


def _decodable(images: Mapping[str, bytes], problems: list[Problem]) -> set[str]:
    usable = set()
    for name in images:
        try:
            inspect_image(images[name], name)
            usable.add(name)
        except (MimicItError, ImageError) as error:
            problems.append(Problem(name, BAD_IMAGE, str(error)[:200]))
    return usable


def _entry(name: str, entry: Any, images: Container[str], problems: list[Problem]) -> Instruction | None:
    """An entry of instructions.json; None, and a Problem, if it cannot be used."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in _ENTRY[:2]):
        problems.append(Problem(name, NOT_AN_ENTRY, "instruction and answer must be texts"))
        return None
    found, related = _names(entry.get("image_ids")), _names(entry.get("rel_ins_ids", []))
    if not found:
        problems.append(Problem(name, NO_IMAGE))
        return None
    if lost := [image for image in found if image not in images]:
        problems.append(Problem(name, DANGLING_IMAGE, ", ".join(lost[:5])))
        return None
    return Instruction(name, entry["instruction"], entry["answer"], found, related or [])


def _names(value: Any) -> list[str] | None:
    names = [value] if isinstance(value, str) else value
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _related(row: Instruction, rows: Mapping[str, Instruction], problems: list[Problem]) -> list[str]:
    """Related ids that exist, once each, without the entry itself."""
    kept = [name for name in dict.fromkeys(row.rel_ins_ids) if name in rows and name != row.id]
    problems += [Problem(row.id, DANGLING_RELATED, name) for name in row.rel_ins_ids if name not in rows]
    return kept


def _read_object(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """A JSON object; of two equal keys the first counts, the other is a Problem."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, value in pairs:
            if built.setdefault(key, value) is not value:
                problems.append(Problem(key, DUPLICATE, path.name))
        return built

    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=build)
    except (OSError, ValueError, RecursionError) as error:
        raise MimicItError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise MimicItError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def open_images(path: str | Path, problems: list[Problem] | None = None) -> Mapping[str, bytes]:
    """The images of a file by id, decoded from base64 when asked for (MimicItError if that fails)."""
    path, problems = Path(path), [] if problems is None else problems
    return ParquetImages(path) if path.suffix == ".parquet" else JsonImages(_read_object(path, problems))


def general_conversations(
    folder: str | Path, count: int | None = None, seed: int | None = None
) -> list[Conversation]:
    """Training conversations of a set, one a training id: its in-context examples, then itself (2.3).

    count: only so many, drawn without replacement by `seed`; fewer where the set has fewer.
    """
    lessons = read_folder(folder)
    names = list(lessons.train_ids)
    if count is not None:
        import numpy as np

        names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]
    conversations = []
    for name in names:
        entries = [*lessons.context(name), lessons.instructions[name]]
        conversations.append(
            Conversation(entries[-1].image_ids, [(e.instruction, e.answer) for e in entries])
        )
    return conversations
