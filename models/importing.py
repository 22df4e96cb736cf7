"""Own data: a folder of images and records becomes questions with checked images; bad records are set aside.

    python -c "from models.importing import scan_folder; print(scan_folder('DIR').reasons())"

Records stand in any *.jsonl or *.json file (JSON lines or one array) at the top of the folder, in the forms
of models/record_forms.py. Nothing that the folder holds is trusted. A record that cannot be used costs itself
only, and is kept as a BadRecord with its place and a reason of REASONS.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from models import images, record_files
from models.record_forms import DUPLICATE_ID, FIELDS, REASONS, TWO_SPLITS, BadRecordError, Rules, parse_record
from models.records import Question
from models.splits import assign_splits

__all__ = [
    "REASONS",
    "BadRecord",
    "Rules",
    "Scan",
    "StoredImage",
    "iter_questions",
    "record_paths",
    "scan_folder",
]


@dataclass(frozen=True)
class BadRecord:
    """A record set aside. place: file and line or item; id: "" where it has none that can be read."""

    place: str
    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class StoredImage:
    """An image by content: `name` is its SHA-256 (32 digits) and extension, size in pixels."""

    name: str
    width: int
    height: int


@dataclass
class Scan:
    """What a folder holds. rows: records read, good or bad; images by content name; unknown: field names."""

    questions: list[Question] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    images: dict[str, StoredImage] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    rows: int = 0

    def reasons(self) -> dict[str, int]:
        """How many records were set aside for each reason, most frequent first."""
        return dict(Counter(record.reason for record in self.bad).most_common())

    @property
    def bad_share(self) -> float:
        """Share of rows that were set aside, wholly or in part."""
        return len({record.place for record in self.bad}) / self.rows if self.rows else 0.0


def record_paths(source: str | Path) -> list[Path]:
    """The record files of a folder in order of name, or the one file that `source` is."""
    source = Path(source)
    if source.is_file():
        return [source]
    names = sorted(path for path in source.iterdir() if path.suffix in (".jsonl", ".json") and path.is_file())
    return [path for path in names if path.name != "source.json"]


def scan_folder(
    source: str | Path,
    rules: Rules | None = None,
    *,
    image_root: str | Path | None = None,
    keep: Callable[[str, bytes], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Read and check everything in a folder (or one record file and the images beside it).

    image_root: what image paths are relative to, the folder itself by default. keep(name, bytes) is called
    once for every image that a record names. progress(rows, bytes) is called after each row, with the bytes
    of record files read so far.
    """
    rules, scan = rules or Rules(), Scan()
    root = Path(image_root) if image_root else Path(source).parent if Path(source).is_file() else Path(source)
    shelf, seen, drafts, done = _Shelf(root, rules, keep), set[str](), list[tuple[str, Question]](), 0
    for path in record_paths(source):
        with path.open("rb") as file:
            scan.files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        for row in record_files.read_rows(path, rules.max_record_bytes):
            scan.rows += 1
            drafts += ((row.place, question) for question in _use(row, rules, shelf, seen, scan))
            if progress:
                progress(scan.rows, done + row.bytes_read)
        done += path.stat().st_size
    _assign(drafts, rules, scan)
    used = {name for question in scan.questions for name in question.images}
    scan.images = {name: shelf.stored[name] for name in sorted(used)}
    return scan


def _use(row: record_files.Row, rules: Rules, shelf: _Shelf, seen: set[str], scan: Scan) -> list[Question]:
    """Questions of a row with their images on the shelf; a row that fails is noted and gives none."""
    try:
        if row.problem:
            raise BadRecordError(row.problem, row.detail)
        questions = parse_record(row.value, rules)
        if taken := [question.id for question in questions if question.id in seen]:
            raise BadRecordError(DUPLICATE_ID, taken[0])
        questions = [
            replace(question, images=[shelf.take(name) for name in question.images]) for question in questions
        ]
    except (BadRecordError, images.ImageError) as error:
        identifier = row.value.get("id") if isinstance(row.value, dict) else None
        shown = (
            str(identifier)[:200].encode("utf-8", "backslashreplace").decode()
            if identifier is not None
            else ""
        )
        scan.bad.append(BadRecord(row.place, shown, error.reason, error.detail[:300]))
        return []
    seen.update(question.id for question in questions)
    scan.unknown.update(_plain(name)[:50] for name in row.value if name not in FIELDS)
    return questions


def _assign(drafts: list[tuple[str, Question]], rules: Rules, scan: Scan) -> None:
    wanted = [(question.split or None, question.images) for _, question in drafts]
    for (place, question), split in zip(drafts, assign_splits(wanted, rules.shares), strict=True):
        if split:
            scan.questions.append(replace(question, split=split))
        else:
            detail = f"{', '.join(question.images)[:200]}, asked for {question.split or 'no split'}"
            scan.bad.append(BadRecord(place, question.id, TWO_SPLITS, detail))


def _plain(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


class _Shelf:
    """Images by content, each file read and checked once: from the name in a record to the content name."""

    def __init__(self, root: Path, rules: Rules, keep: Callable[[str, bytes], None] | None) -> None:
        self.root, self.rules, self.keep = root, rules, keep
        self.stored: dict[str, StoredImage] = {}
        self.known: dict[str, str | images.ImageError] = {}

    def take(self, name: str) -> str:
        if name not in self.known:
            try:
                self.known[name] = self._store(name)
            except images.ImageError as error:
                self.known[name] = error
        known = self.known[name]
        if isinstance(known, images.ImageError):
            raise images.ImageError(known.reason, known.detail)
        return known

    def _store(self, name: str) -> str:
        data = images.read_image(self.root, name, self.rules.max_image_bytes)
        info = images.inspect_image(data, name, self.rules.max_pixels)
        stored = f"{hashlib.sha256(data).hexdigest()[:32]}.{images.FORMATS[info.format]}"
        if stored not in self.stored:
            self.stored[stored] = StoredImage(stored, info.width, info.height)
            if self.keep:
                self.keep(stored, data)
        return stored


def iter_questions(scan: Scan, folder: str) -> Iterator[Question]:
    """The questions of a scan with their images named under `folder`, as a records file names them."""
    for question in scan.questions:
        yield replace(question, images=[f"{folder}/{name}" for name in question.images])
