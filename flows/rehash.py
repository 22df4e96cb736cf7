"""Does a chain hold? Every byte of it that is here is hashed anew, and all records are compared.

    longview explain champion --verify

Checked: files in the workspace and in DVC's cache against their md5s; what each stage read against what its
producer made (the chain is unbroken); the md5s that MLflow recorded as inputs. What is not here is looked
for in the default remote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows import lineage
from flows.lineage import Artifact, Chain, Snapshot
from flows.objects import Objects, directory_md5, rehash
from flows.versions import resolve

EQUAL, DIFFERS, AWAY, LOST, OTHER, UNKNOWN = (
    "equal",
    "differs",
    "in remote",
    "lost",
    "other version",
    "unknown",
)
FAULTS = (DIFFERS, LOST)
Say = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """One check: where (`workspace`, `cache`, `chain`, `mlflow`), of what, and how it came out."""

    where: str
    path: str
    state: str
    detail: str = ""


def bytes_of(chain: Chain, objects: Objects) -> int:
    """How many bytes `verify` will read, as far as dvc.lock says sizes."""
    return sum(
        (a.size or 0) * (objects.path(a.md5).exists() + Path(a.path).exists()) for a in artifacts(chain)
    )


def artifacts(chain: Chain) -> list[Artifact]:
    """Everything that DVC keeps of a chain, each once: the data, and what each step made."""
    made = [out for step in chain.steps for out in step.makes]
    return list(dict.fromkeys([*([chain.data] if chain.data else []), *made]))


def verify(root: Path, chain: Chain, objects: Objects, read: Say = lambda _: None) -> Iterator[Finding]:
    """Check everything; call within `objects.opened(root)`. `read` hears the bytes that were hashed."""
    source = None if chain.source == lineage.WORKSPACE else resolve(root, chain.source)
    found = lineage.snapshot(root, source)
    try:
        here = lineage.snapshot(root).known
    except lineage.LineageError:
        here = {}
    seen: set[str] = set()
    for each in artifacts(chain):
        yield _workspace(each, here, objects, read)
        yield from _cache(each, objects, seen, read)
    yield from _links(chain, found, objects)
    yield from _mlflow(chain)


def _workspace(made: Artifact, here: dict[str, Artifact], objects: Objects, read: Say) -> Finding:
    path = Path(made.path)
    if not path.exists():
        return Finding("workspace", made.path, UNKNOWN, "not checked out")
    if made.path not in here or here[made.path].md5 != made.md5:
        return Finding("workspace", made.path, OTHER, "the workspace has another version of it")
    if not made.md5.endswith(".dir"):
        return _compare("workspace", made.path, {made.path: made.md5}, {made.path: rehash(path, read)})
    actual = {
        file.relative_to(path.absolute()).as_posix(): rehash(file, read) for file in _files(path, objects)
    }
    listed = objects.listing(made.md5)
    if listed is not None:
        return _compare("workspace", made.path, listed, actual)
    same = directory_md5(actual) == made.md5
    return Finding(
        "workspace", made.path, EQUAL if same else DIFFERS, "" if same else "no list of its files here"
    )


def _files(path: Path, objects: Objects) -> list[Path]:
    return objects.files(path.absolute())


def _compare(where: str, path: str, expected: dict[str, str], actual: dict[str, str]) -> Finding:
    wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    if not wrong:
        return Finding(where, path, EQUAL, f"{len(expected)} files")
    words = [f"{name} ({_difference(name, expected, actual)})" for name in wrong[:5]]
    return Finding(
        where, path, DIFFERS, ", ".join(words) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    )


def _difference(name: str, expected: dict[str, str], actual: dict[str, str]) -> str:
    if name not in actual:
        return "missing"
    return "changed" if name in expected else "not in the version"


def _cache(made: Artifact, objects: Objects, seen: set[str], read: Say) -> Iterator[Finding]:
    """The listing and the files of one artifact; objects that several artifacts share are hashed once."""
    listed = objects.listing(made.md5) if made.md5.endswith(".dir") else {}
    wanted = {made.md5: "the list of files"} if made.md5.endswith(".dir") else {made.md5: made.path}
    wanted |= {md5: name for name, md5 in (listed or {}).items()}
    absent = {md5 for md5 in wanted if not objects.path(md5).is_file()}
    wrong = []
    for md5, name in wanted.items():
        if md5 in absent or md5 in seen:
            continue
        if rehash(objects.path(md5), read) != md5.removesuffix(".dir"):
            wrong.append(f"{name} ({objects.path(md5)})")
        else:
            seen.add(md5)  # a bad one is reported wherever it is needed
    if wrong:
        yield Finding("cache", made.path, DIFFERS, ", ".join(wrong[:5]))
    elif not absent:
        yield Finding("cache", made.path, EQUAL, f"{len(wanted)} objects")
    if absent:
        yield _elsewhere(made, absent, wanted, objects)


def _elsewhere(made: Artifact, absent: set[str], wanted: dict[str, str], objects: Objects) -> Finding:
    there = objects.in_remote(absent)
    names = ", ".join(wanted[md5] for md5 in sorted(absent)[:5])
    if there is None:
        return Finding("cache", made.path, UNKNOWN, f"missing here, and the remote does not answer: {names}")
    if absent <= there:
        return Finding(
            "cache", made.path, AWAY, f"{len(absent)} of {len(wanted)} objects: `dvc pull {made.path}`"
        )
    lost = ", ".join(wanted[md5] for md5 in sorted(absent - there)[:5])
    return Finding("cache", made.path, LOST, f"neither here nor in the remote: {lost}")


def _links(chain: Chain, found: Snapshot, objects: Objects) -> Iterator[Finding]:
    """What each stage read is what its producer made."""
    for step in chain.steps:
        for read in step.reads:
            made = found.made_md5(read.path, objects)
            words = f"{step.stage} read {read.path}"
            if made is None:
                yield Finding("chain", words, UNKNOWN, "a list of files is missing here")
            elif made != read.md5:
                yield Finding("chain", words, DIFFERS, f"it read {read.md5}, its producer made {made}")
            else:
                yield Finding("chain", words, EQUAL)


def _mlflow(chain: Chain) -> Iterator[Finding]:
    """The inputs that MLflow recorded are those of dvc.lock. (The run was found by the md5 of its output.)"""
    for step in chain.steps:
        if step.mlflow is None:
            continue
        reads = {read.path: read.md5 for read in step.reads}
        wrong = [
            f"{path} {digest} (dvc.lock: {reads[path]})"
            for path, digest in step.mlflow.inputs.items()
            if path in reads and reads[path] != digest
        ]
        where = f"{step.stage} in run {step.mlflow.run_id}"
        yield Finding("mlflow", where, DIFFERS if wrong else EQUAL, ", ".join(wrong))
