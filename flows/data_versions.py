"""The versions of the source data: what they are, which runs were trained on them, and how two differ.

longview data versions
longview data diff 3fa1 77562a
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows import data, objects, registered, versions
from flows.objects import Objects
from flows.registered import Registered

RECORDS = "records.jsonl"
SHOWN = 5
"""Examples of each kind of change."""
FREQUENT = 12
"""Answers listed by name; the others are one line."""
OTHERS = "others"
BINS = 12
"""Of a distribution of lengths, at most."""


class DataVersionError(ValueError):
    """No such version of the data, or its records are not to be had."""


@dataclass(frozen=True)
class DataVersion:
    """One version of data/. `since`: ISO time of the first run on it. `size` in bytes. `models`: generations
    and registered versions that were trained on it. Unknown values are None: `models` without MLflow."""

    md5: str
    in_use: bool
    since: str | None
    size: int | None
    files: int | None
    records: int | None
    kind: str | None
    runs: tuple[str, ...]
    models: tuple[str, ...] | None


@dataclass(frozen=True)
class Side:
    """What one version holds: counts, answers by frequency, and lengths in characters (mean)."""

    md5: str
    records: int
    splits: dict[str, int]
    answers: dict[str, int]
    question_length: float
    answer_length: float


@dataclass(frozen=True)
class Difference:
    """`before` against `after`. changed: which fields changed, by how many records. examples: by kind.
    lengths: of questions and answers, how many records have `from` to `to` characters in each version."""

    before: Side
    after: Side
    added: int
    removed: int
    changed: dict[str, int]
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lengths: dict[str, list[dict[str, int]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def listing(root: Path, unknown: Callable[[str], None]) -> list[DataVersion]:
    """Every version that a run was trained on, newest first, and the one in use.

    unknown: hears why the models are not known where MLflow cannot be asked. Raises VersionError or
    PipelineError.
    """
    every, here = versions.versions(root), data.version(root)
    registry = _models(root, unknown)
    order = list(dict.fromkeys([*([here] if here else []), *(version.data for version in every)]))
    found = []
    with objects.opened(root) as stored:
        for md5 in order:
            runs = [version for version in every if version.data == md5]
            pointer = _pointer(root, runs, md5 == here)
            out = (pointer.get("outs") or [{}])[0]
            kept = {md5 for run in runs for md5 in _made(root, run)}
            found.append(
                DataVersion(
                    md5=md5,
                    in_use=md5 == here,
                    since=runs[-1].when.isoformat() if runs else None,
                    size=out.get("size"),
                    files=out.get("nfiles"),
                    records=_count(stored, md5),
                    kind=(pointer.get("meta") or {}).get("kind"),
                    runs=tuple(run.tag for run in runs),
                    models=None if registry is None else _trained(registry, kept),
                )
            )
    return found


def _models(root: Path, unknown: Callable[[str], None]) -> list[Registered] | None:
    try:
        return registered.versions(root, registered.client(root))
    except registered.RegistryUnknown as error:
        unknown(f"the models are not known: {error}")
        return None


def _trained(registry: list[Registered], made: set[str]) -> tuple[str, ...]:
    """The registered versions with a checkpoint among what was made."""
    return tuple(model.name for model in registry if set(model.checkpoints.values()) & made)


def _pointer(root: Path, runs: list[versions.RunVersion], in_use: bool) -> dict[str, Any]:
    """data.dvc of this version."""
    from ruamel.yaml import YAML

    if in_use:
        text = (root / data.POINTER).read_text(encoding="utf-8")
    else:
        text = versions.read(root, runs[0], data.POINTER).decode("utf-8")
    return YAML(typ="safe").load(text) or {}


def _made(root: Path, run: versions.RunVersion) -> Iterator[str]:
    for stage in versions.lock(root, run)["stages"].values():
        for entry in [*stage.get("outs", []), *stage.get("deps", [])]:
            yield str(entry.get("md5"))


def _count(stored: Objects, md5: str) -> int | None:
    path = records_of(stored, md5)
    if path is None:
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def records_of(stored: Objects, md5: str) -> Path | None:
    """The records of a version in the cache; None if the cache has them not."""
    part = stored.part(md5, RECORDS)
    path = stored.path(part) if part else None
    return path if path and path.is_file() else None


def find(root: Path, name: str | None) -> str:
    """The md5 that is meant: of data in use (None), an md5 or its beginning, a run, or a git revision.

    Raises DataVersionError.
    """
    here = data.version(root)
    if name is None:
        if here is None:
            raise DataVersionError(f"there is no {data.POINTER}: no data is in use")
        return here
    known = {version.data for version in versions.versions(root)} | ({here} if here else set())
    found = [md5 for md5 in known if md5.startswith(name)]
    if len(found) == 1:
        return found[0]
    try:
        return versions.resolve(root, name).data
    except versions.VersionError as error:
        some = ", ".join(sorted(md5[:8] for md5 in known)) or "none"
        raise DataVersionError(
            f"no data version '{name}' (there are: {some}), and as a run: {error}"
        ) from None


def diff(root: Path, before: str, after: str) -> Difference:
    """How the records of two versions differ, by id. Reads them in the cache, and fetches what it lacks.

    Raises DataVersionError.
    """
    with objects.opened(root) as stored:
        paths = [_fetched(stored, md5) for md5 in (before, after)]
        images = [stored.listing(md5) or {} for md5 in (before, after)]
    old, one = _read(paths[0], images[0])
    new, other = _read(paths[1], images[1])
    changed: Counter[str] = Counter()
    examples: dict[str, list[tuple[str, str]]] = {"added": [], "removed": [], "changed": []}
    for key in new.keys() | old.keys():
        if key not in old:
            examples["added"].append(("", key))
        elif key not in new:
            examples["removed"].append(("", key))
        elif old[key] != new[key]:
            parts = zip(FIELDS, _parts(old[key]), _parts(new[key]), strict=True)
            fields = [name for name, was, is_now in parts if was != is_now]
            changed.update(fields)
            examples["changed"].append((", ".join(fields), key))
    counts = {kind: len(found) for kind, found in examples.items()}
    wanted = {kind: sorted(found, key=lambda pair: pair[1])[:SHOWN] for kind, found in examples.items()}
    shown = _examples(paths, wanted)
    frequent = [answer for answer, _ in (one.answers + other.answers).most_common(FREQUENT)]
    return Difference(
        _side(before, one, frequent),
        _side(after, other, frequent),
        counts["added"],
        counts["removed"],
        {"records": counts["changed"], **changed},
        shown,
        {name: _histogram(one.lengths[name], other.lengths[name]) for name in LENGTHS},
    )


FIELDS = ("question", "answer", "image")
PART_BYTES = 8
"""Of each field's digest: a million records take 24 MB."""


def _parts(digest: bytes) -> list[bytes]:
    return [digest[at : at + PART_BYTES] for at in range(0, len(digest), PART_BYTES)]


LENGTHS = ("question", "answer")


@dataclass(frozen=True)
class Counts:
    """What is counted of a version: records by answer, by split, and by length of a field in characters."""

    answers: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in LENGTHS})


def _read(path: Path, files: dict[str, str]) -> tuple[dict[str, bytes], Counts]:
    """Id -> digests of FIELDS, and what the version holds."""
    digests: dict[str, bytes] = {}
    counts = Counts()
    for record in _lines(path):
        question, answer = _text(record, "question"), _text(record, "answer")
        bytes_of = json.dumps([files.get(name, name) for name in pictures(record)])
        digests[str(record.get("id"))] = b"".join(_digest(text) for text in (question, answer, bytes_of))
        counts.answers[answer] += 1
        counts.splits[str(record.get("split", ""))] += 1
        counts.lengths["question"][len(question)] += 1
        counts.lengths["answer"][len(answer)] += 1
    return digests, counts


def pictures(record: dict[str, Any]) -> list[str]:
    """The names of a record's images."""
    return [str(name) for name in record.get("images") or [record.get("image")] if name]


def _side(md5: str, counts: Counts, frequent: list[str]) -> Side:
    """`frequent`: the answers to name, those of both versions together."""
    answers = {name: counts.answers[name] for name in frequent if name in counts.answers}
    rest = counts.answers.total() - sum(answers.values())
    means = {
        name: sum(length * number for length, number in found.items()) / max(1, found.total())
        for name, found in counts.lengths.items()
    }
    return Side(
        md5,
        counts.answers.total(),
        dict(counts.splits),
        {**answers, OTHERS: rest} if rest else answers,
        means["question"],
        means["answer"],
    )


def _histogram(one: Counter[int], other: Counter[int]) -> list[dict[str, int]]:
    """Both versions in the same bins of equal width."""
    every = one.keys() | other.keys()
    if not every:
        return []
    low, high = min(every), max(every)
    width = -(-(high - low + 1) // BINS)
    return [
        {
            "from": start,
            "to": start + width - 1,
            **{
                side: sum(number for length, number in found.items() if start <= length < start + width)
                for side, found in (("before", one), ("after", other))
            },
        }
        for start in range(low, high + 1, width)
    ]


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=PART_BYTES).digest()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _examples(paths: list[Path], wanted: dict[str, list[tuple[str, str]]]) -> dict[str, list[dict[str, Any]]]:
    """The records that are shown, read again: they were not kept."""
    keys = {key for found in wanted.values() for _, key in found}
    old, new = (
        {str(record.get("id")): record for record in _lines(path) if str(record.get("id")) in keys}
        for path in paths
    )
    return {
        kind: [
            {"id": key, "fields": fields, "before": old.get(key), "after": new.get(key)}
            for fields, key in found
        ]
        for kind, found in wanted.items()
    }


def _fetched(stored: Objects, md5: str) -> Path:
    """The records of a version, from the remote if the cache has them not."""
    path = records_of(stored, md5)
    if path:
        return path
    stored.fetch(md5, RECORDS)
    path = records_of(stored, md5)
    if path is None:
        raise DataVersionError(
            f"data version {md5[:8]}: neither the cache nor the remote has its {RECORDS}; "
            "`dvc remote list` says where was looked"
        )
    return path
