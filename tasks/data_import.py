"""Own data: check a folder of images and records, and make it the source data set (data/, in data.dvc).

    python -m tasks.data_import DIR            # import: data/ is replaced, data.dvc carries the new version
    python -m tasks.data_import DIR --check    # only look: counts, problems; exit status 1 on errors

The new data/ is built beside the old one and takes its place in one step. The old version stays in the DVC
cache, with its pointer in .work/data_import/<md5>.pointer. Records that cannot be used are listed, with their
reasons, in .work/data_import/quarantine.jsonl. The same folder gives the same version every time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.data_report import Report, describe
from models.folders import drop
from models.importing import Rules, Scan, iter_questions, record_paths, scan_folder
from models.records import write_jsonl
from tasks.meter import meter

if TYPE_CHECKING:
    from dvc.repo import Repo

DATA, POINTER = "data", "data.dvc"
WORK = Path(".work") / "data_import"
MAX_BAD_SHARE = 0.1
"""Share of unusable records up to which an import goes on, by default."""


class ImportRefused(RuntimeError):
    """Nothing was imported and data/ is as it was; the message says why and what to do."""


class SourceRefused(ImportRefused):
    """What is to be imported is to blame; trying again refuses it again."""


@dataclass(frozen=True)
class Imported:
    """version: DVC's md5 of the new data/; replaced: of the old one, None if there was none."""

    version: str
    replaced: str | None
    report: Report
    quarantine: Path | None


def import_folder(
    source: str | Path,
    root: str | Path = ".",
    *,
    image_root: str | Path | None = None,
    rules: Rules | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Imported:
    """Make a folder (or one record file and the images beside it) the source data set of the checkout `root`.

    image_root: what image paths in the records are relative to, the folder itself by default. Raises
    ImportRefused if the current data/ is not safe in DVC, or if too many records are bad.
    """
    source, root, rules = Path(source).resolve(), Path(root).resolve(), rules or Rules()
    _require_source(source, root)
    work = root / WORK
    with _exclusive(work), _open_repo(root) as repo:
        with _writing(repo, root):
            _recover(repo, root, work)
        _secure_current(repo, root)
        scan = _build(source, work, rules, image_root)
        quarantine = _quarantine(scan, root)
        _require_enough(scan, max_bad_share, quarantine)
        with _writing(repo, root):
            replaced = _secure_current(repo, root)
            version = _swap(repo, root, work)
    return Imported(version, replaced, describe(scan), quarantine)


def check(source: str | Path, *, image_root: str | Path | None = None, rules: Rules | None = None) -> Report:
    """Look at a folder to import, or at data/ itself, and change nothing."""
    source = Path(source)
    if not source.exists() or not record_paths(source):
        raise ImportRefused(f"{source}: no folder with *.jsonl or *.json records")
    return describe(_scan(source, rules or Rules(), image_root))


def _require_source(source: Path, root: Path) -> None:
    if not source.exists():
        raise SourceRefused(f"{source} does not exist")
    if source.is_relative_to(root / DATA):
        raise SourceRefused(f"{source} is (in) {DATA}/, which the import replaces: copy it elsewhere first")
    if not record_paths(source):
        raise SourceRefused(f"no *.jsonl or *.json file with records in {source}")


def _build(source: Path, work: Path, rules: Rules, image_root: str | Path | None) -> Scan:
    """The new data/ in work/new, from a source that may change or be hostile; returns what was found."""
    new = work / "new"
    shutil.rmtree(new, ignore_errors=True)
    (new / "images").mkdir(parents=True)
    scan = _scan(source, rules, image_root, new / "images")
    for path in (new / "images").iterdir():
        if path.name not in scan.images:  # its records were set aside
            path.unlink()
    write_jsonl(new / "records.jsonl", iter_questions(scan, "images"))
    origin = {
        "kind": "import",
        "files": scan.files,
        "rows": scan.rows,
        "questions": len(scan.questions),
        "images": len(scan.images),
        "quarantined": dict(sorted(scan.reasons().items())),
        "shares": dict(rules.shares),
        "context_turns": rules.context_turns,
    }
    (new / "source.json").write_text(
        json.dumps(origin, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return scan


def _scan(source: Path, rules: Rules, image_root: str | Path | None, images: Path | None = None) -> Scan:
    def keep(name: str, data: bytes) -> None:
        if images:
            (images / name).write_bytes(data)

    total = sum(path.stat().st_size for path in record_paths(source))
    with meter("records", total) as advance:
        return scan_folder(source, rules, image_root=image_root, keep=keep, progress=advance)


def _quarantine(scan: Scan, root: Path) -> Path | None:
    path = root / WORK / "quarantine.jsonl"
    path.unlink(missing_ok=True)
    if not scan.bad:
        return None
    write_jsonl(path, scan.bad)
    return path.relative_to(root)


def _require_enough(scan: Scan, max_bad_share: float, quarantine: Path | None) -> None:
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in scan.reasons().items())
    if not scan.questions:
        raise SourceRefused(f"none of {scan.rows:,} records can be used: {reasons or 'the files are empty'}")
    if scan.bad_share > max_bad_share:
        raise SourceRefused(
            f"{scan.bad_share:.1%} of {scan.rows:,} records cannot be used, {max_bad_share:.1%} may be:\n"
            f"  {reasons}\n"
            f"  each with its place and reason: {quarantine}\n"
            "  mend them, or allow a larger share (--max-bad-share)"
        )


# The DVC side ----------------------------------------------------------------


@contextmanager
def _exclusive(work: Path) -> Iterator[None]:
    """One import at a time in a checkout; the lock goes with the process."""
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ImportRefused("another import is running in this checkout") from None
        yield


@contextmanager
def _open_repo(root: Path) -> Iterator[Repo]:
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            yield repo
    except NotDvcRepoError as error:
        raise ImportRefused(
            f"{root} is not a Longview checkout with DVC set up (`dvc init` does it)"
        ) from error
    except LockError as error:
        raise ImportRefused(
            f"{DATA}/ is in use; wait for the run to end, then import again.\n{error}"
        ) from error
    except DvcException as error:
        raise ImportRefused(f"DVC: {error}") from error


@contextmanager
def _writing(repo: Repo, root: Path) -> Iterator[None]:
    """DVC's own write lock on data/, so that no stage reads it meanwhile; `repo.add` shares it."""
    from dvc.rwlock import rwlock

    hardlink = repo.config["core"].get("hardlink_lock", False)
    with rwlock(repo.tmp_dir, repo.fs, " ".join(sys.argv), [], [str(root / DATA)], hardlink):
        yield


def _pointer_out(repo: Repo, root: Path) -> Any:
    """The output that data.dvc describes, None without data.dvc."""
    if not (root / POINTER).is_file():
        return None
    (stage,) = repo.stage.load_file(str(root / POINTER))
    return stage.outs[0]


def _is_clean(repo: Repo, root: Path) -> bool:
    out = _pointer_out(repo, root)
    return out is not None and bool(out.hash_info) and not out.workspace_status()


def _secure_current(repo: Repo, root: Path) -> str | None:
    """Make sure that the current data/ can be had again; returns its version, None if there is none."""
    data, out = root / DATA, _pointer_out(repo, root)
    filled = data.is_dir() and any(data.iterdir())
    if filled and not _is_clean(repo, root):
        raise ImportRefused(
            f"{DATA}/ holds data that {POINTER} does not record, and an import would lose it.\n"
            f"  to keep it:       dvc add {DATA}, then commit {POINTER}\n"
            f"  to discard it:    dvc checkout {POINTER} --force, or remove {DATA}/"
        )
    if out is None or not out.hash_info:
        return None
    if filled and out.changed_cache():
        repo.add(str(data))
    version = str(out.hash_info.value)
    keep_pointer(root, version)
    return version


def keep_pointer(root: Path, version: str) -> None:
    """Keep data.dvc, which names this version, before another takes its place: the way back."""
    path = root / WORK / f"{version}.pointer"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    shutil.copyfile(root / POINTER, part)
    part.replace(path)


def _swap(repo: Repo, root: Path, work: Path) -> str:
    """work/new becomes data/ and is added to DVC; if that fails, everything is as before."""
    data, old, pointer = root / DATA, work / "old", root / POINTER
    before = pointer.read_bytes() if pointer.is_file() else None
    if data.exists():
        data.rename(old)
    else:
        old.mkdir()
    try:
        (work / "new").rename(data)
        repo.add(str(data))
        version = _mark(repo, root)
    except BaseException:
        _restore(root, work)
        if before is None:
            pointer.unlink(missing_ok=True)
        else:
            pointer.write_bytes(before)
        raise
    drop(old, old.with_name("gone"))
    return version


def _mark(repo: Repo, root: Path) -> str:
    """Note in data.dvc that this data was imported (and cannot be rebuilt); returns its version."""
    (stage,) = repo.stage.load_file(str(root / POINTER))
    stage.meta = {"kind": "import"}
    stage.dump()
    return str(stage.outs[0].hash_info.value)


def _recover(repo: Repo, root: Path, work: Path) -> None:
    """After an import that was killed between its two renames or before its end."""
    if (work / "old").is_dir():
        if _is_clean(repo, root):
            _mark(repo, root)
            drop(work / "old", work / "gone")
        else:
            _restore(root, work)
    shutil.rmtree(work / "gone", ignore_errors=True)


def _restore(root: Path, work: Path) -> None:
    if (root / DATA).exists():
        drop(root / DATA, work / "gone")
    (work / "old").rename(root / DATA)
    if not any((root / DATA).iterdir()):
        (root / DATA).rmdir()


# The command line ----------------------------------------------------------------


def print_report(report: Report) -> None:
    """Counts by split and set, reasons of bad records, errors and warnings, as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    counts = Table("split", *(f"{name} questions" for name in report.counts["train"]), title_justify="left")
    for split, sets in report.counts.items():
        counts.add_row(split, *(f"{count:,}" for count in sets.values()))
    console.print(
        f"{report.questions:,} questions about {report.images:,} images, from {report.rows:,} records"
    )
    console.print(counts)
    for name, found in report.answers.items():
        answers = ", ".join(f"{answer[:40]!r} {share:.1%}" for answer, share in found)
        console.print(f"most frequent test answers, {name}: {answers}", markup=False)
    if report.reasons:
        table = Table("set aside because", "records")
        for reason, count in report.reasons.items():
            table.add_row(reason, f"{count:,}")
        console.print(table)
    for kind, messages in (("error", report.errors), ("warning", report.warnings)):
        for message in messages:
            console.print(f"{kind}: {message}", markup=False, soft_wrap=True)


def print_imported(imported: Imported) -> None:
    """The report of an import, the new version, and how to go back."""
    print_report(imported.report)
    if imported.quarantine:
        print(f"records set aside: {imported.quarantine}")
    print(f"{DATA}/ is now version {imported.version}; commit {POINTER} to keep it")
    if imported.replaced not in (None, imported.version):
        print(f"to go back:  cp {WORK}/{imported.replaced}.pointer {POINTER} && dvc checkout {POINTER}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 errors found or import refused."""
    parser = argparse.ArgumentParser(prog="python -m tasks.data_import", description="Import your own data.")
    parser.add_argument("source", help="a folder, or one record file in it")
    parser.add_argument("--check", action="store_true", help="only report")
    parser.add_argument(
        "--images", help="folder that image paths are relative to (default: the source folder)"
    )
    parser.add_argument("--max-bad-share", type=float, default=MAX_BAD_SHARE, help="default %(default)s")
    parser.add_argument(
        "--max-pixels", type=int, default=Rules.max_pixels, help="of an image, default %(default)s"
    )
    parser.add_argument("--context-turns", type=int, default=Rules.context_turns, help="default %(default)s")
    options = parser.parse_args(arguments)
    rules = Rules(max_pixels=options.max_pixels, context_turns=options.context_turns)
    try:
        if options.check:
            report = check(options.source, image_root=options.images, rules=rules)
            print_report(report)
            return 1 if report.errors else 0
        print_imported(
            import_folder(
                options.source, image_root=options.images, rules=rules, max_bad_share=options.max_bad_share
            )
        )
    except ImportRefused as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
