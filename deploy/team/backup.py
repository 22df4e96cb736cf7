"""Backup and restore of a team's servers: PostgreSQL's databases and the buckets.

    docker compose run --rm backup save       # into ./backups, while everything runs
    docker compose run --rm backup list
    docker compose run --rm backup restore    # the newest; or `restore 20261123T030000Z`

A backup is `databases/<time>/*.dump`, made by pg_dump, and `buckets/`, one mirror for all backups: what a
bucket has lost stays in it, so that every dump finds its files. The databases come first, so no file that
a dump names is missing from the mirror.

Environment: PGHOST, PGPORT, PGUSER, PGPASSWORD of PostgreSQL's superuser; AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY of one who may read and write both buckets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DATABASES = ("mlflow", "mlflow_auth", "prefect")
BUCKETS = ("mlflow", "dvc")
LOCK_TIMEOUT = "10s"
PART = ".longview-part"


class BackupError(RuntimeError):
    """Nothing was saved or restored, or not all of it; the message says what."""


def save(folder: Path, client: Any) -> str:
    """Dump every database and bring the mirror of every bucket up to date; return the backup's name."""
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    part, done = folder / "databases" / f"{name}.part", folder / "databases" / name
    part.mkdir(parents=True)
    for database in DATABASES:
        run("pg_dump", "--format=custom", f"--file={part / database}.dump", f"--dbname={database}")
    for bucket in BUCKETS:
        for key, size, changed_s in objects(client, bucket):
            path = inside(folder / "buckets" / bucket, key)
            if not same(path, size, changed_s):
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, key, f"{path}{PART}")
                os.utime(f"{path}{PART}", (changed_s, changed_s))
                Path(f"{path}{PART}").replace(path)
    part.rename(done)  # a name without .part is a whole backup
    return name


def restore(folder: Path, client: Any, name: str | None) -> str:
    """Put the databases back as they were, and files that a bucket lacks. MLflow and Prefect are stopped."""
    made = names(folder)
    name = name or (made[-1] if made else None)
    if name not in made:
        raise BackupError(f"no backup {name or ''} in {folder}: there are {', '.join(made) or 'none'}")
    for bucket in BUCKETS:
        there = {key: size for key, size, _ in objects(client, bucket)}
        root = folder / "buckets" / bucket
        for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != PART):
            key = path.relative_to(root).as_posix()
            if there.get(key) != path.stat().st_size:
                client.upload_file(str(path), bucket, key)
    for database in DATABASES:
        whole = ["--clean", "--if-exists", "--single-transaction", "--exit-on-error"]
        dump = folder / "databases" / name / f"{database}.dump"
        run("pg_restore", *whole, f"--dbname={database}", str(dump))
    return name


def names(folder: Path) -> list[str]:
    """The whole backups, oldest first."""
    found = (folder / "databases").glob("*Z")
    return sorted(path.name for path in found if path.is_dir())


def objects(client: Any, bucket: str) -> Iterator[tuple[str, int, float]]:
    """Key, size in bytes and time of the last change of everything in a bucket."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            yield item["Key"], item["Size"], item["LastModified"].timestamp()


def inside(root: Path, key: str) -> Path:
    """Where a key is kept. Raises BackupError if that would lie outside."""
    path = root / key
    if key.endswith("/") or not path.resolve().is_relative_to(root.resolve()):
        raise BackupError(f"the key {key!r} is no file name: take it out of the bucket, or save it by hand")
    return path


def same(path: Path, size: int, changed_s: float) -> bool:
    """Whether the mirror has this version of a file."""
    return path.is_file() and path.stat().st_size == size and path.stat().st_mtime >= changed_s


def run(command: str, *arguments: str) -> None:
    """One of PostgreSQL's programs. A lock that is not free soon is a server that still runs."""
    environment = {**os.environ, "PGOPTIONS": f"-c lock_timeout={LOCK_TIMEOUT}"}
    done = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        hint = " (stop mlflow and prefect first)" if "lock timeout" in done.stderr else ""
        raise BackupError(f"{command} {arguments[-1]}: {done.stderr.strip()}{hint}")


def main() -> None:
    """Save, restore or list. Exit status 1 with one message if something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("backups"))
    parser.add_argument("what", choices=["save", "restore", "list"])
    parser.add_argument("name", nargs="?", help="of the backup to restore; the newest if left out")
    arguments = parser.parse_args()
    if arguments.what == "list":
        print(*names(arguments.folder), sep="\n")
        return
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3")
    try:
        if arguments.what == "save":
            print(f"saved {save(arguments.folder, client)}")
        else:
            print(f"restored {restore(arguments.folder, client, arguments.name)}")
    except (BackupError, BotoCoreError, ClientError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
