"""A team's servers, all real: PostgreSQL, S3 with keys, MLflow with users, Prefect with a password.

Set up by the files of deploy/team/; only the containers around them are missing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from benchmarks import chaos, chaos_project
from tasks import promotion
from tasks.registry import Agents, Registry
from tests.support.team import REGION, Team, servers, team


def bucket(found: Team, name: str) -> Any:
    key, secret = found.keys["root"]
    return boto3.resource(
        "s3",
        endpoint_url=found.s3,
        region_name=REGION,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    ).Bucket(name)


def checkout(found: Team) -> Path:
    """The small project of benchmarks/chaos_project.py with the team's bucket as its DVC remote."""
    folder = found.folder / "checkout"
    chaos_project.make(folder)
    key, secret = found.keys["dvc"]
    for words in (
        ["add", "--default", "team", "s3://dvc/longview"],
        ["modify", "team", "endpointurl", found.s3],
        ["modify", "team", "region", REGION],
        ["modify", "--local", "team", "access_key_id", key],
        ["modify", "--local", "team", "secret_access_key", secret],
    ):
        dvc(folder, "remote", *words)
    return folder


def dvc(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(
        command, cwd=folder, env=chaos_project.environment(folder), check=True, capture_output=True, text=True
    ).stdout


def longview(folder: Path, client: dict[str, str], *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=folder,
        env={**chaos_project.environment(folder), **client},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def test_a_run_on_the_teams_servers_a_backup_and_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with team(tmp_path) as found:
        with servers(found):
            assert "ada: add" in found.script("user.py", "add", "ada", server="users")
            client = found.client("ada", "ada's own password")
            folder = checkout(found)
            status, said = longview(folder, client, "run")
            assert status == 0, said
            kept = {item.key for item in bucket(found, "mlflow").objects.all()}
            assert any(key.endswith("predictions.jsonl") for key in kept), "MLflow's artifacts are in S3"

            for lost in (".dvc/cache", "artifacts", "data"):
                shutil.rmtree(folder / lost)
            dvc(folder, "pull", "--quiet")
            assert "up to date" in dvc(folder, "status")

            status, said = longview(folder, {**client, "MLFLOW_TRACKING_PASSWORD": "wrong"}, "model", "list")
            assert status == 1 and "MLFLOW_TRACKING_PASSWORD" in said and "Traceback" not in said, said
            chaos.new_data(folder, 1)
            status, said = longview(folder, {**client, "PREFECT_API_AUTH_STRING": "a:b"}, "run")
            assert status == 1 and "PREFECT_API_AUTH_STRING" in said and "Traceback" not in said, said

            assert "saved" in backup(found, "save")
            found.environments["users"]["NEW_PASSWORD"] = "bo's own password"
            assert "bo: add" in found.script("user.py", "add", "bo", server="users")
            other = found.client("bo", "bo's own password")
            status, said = longview(folder, other, "run")
            assert status == 0, said
            assert champion(found, client, monkeypatch) == "2"
            decide_on_what_another_registered(folder, client, other, monkeypatch)
        bucket(found, "mlflow").objects.all().delete()
        assert "restored" in backup(found, "restore")
        assert {item.key for item in bucket(found, "mlflow").objects.all()} == kept
        with servers(found):
            assert champion(found, client, monkeypatch) == "1"


def decide_on_what_another_registered(
    folder: Path, client: dict[str, str], other: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ada's candidates wait; Bo, who may not delete what is hers, says no to one and yes to the next."""
    registry = registry_of(client, monkeypatch)
    waiting(registry, "c", folder)
    status, said = longview(folder, other, "model", "approve", "--reject", "--reason", "misreads sevens")
    assert status == 0 and "version 3 (c) is not promoted" in said, said
    assert promotion.take_default(registry) is None and registry.waiting() is None
    waiting(registry, "d", folder)
    status, said = longview(folder, other, "model", "approve", "--reason", "looked at forty")
    assert status == 0 and "version 4 (d) is champion" in said, said
    rows = json.loads(longview(folder, other, "model", "list", "--json")[1])
    assert [row["aliases"] for row in rows] == [["champion"], [], [], []]
    assert rows[0]["awaiting"] is None and rows[1]["declined"]["reason"] == "misreads sevens"
    for words, number in ((("rollback",), "2"), (("promote", "3"), "3")):
        status, said = longview(folder, other, "model", *words, "--reason", "to see it")
        assert status == 0 and registry.champion().number == number, said


def waiting(registry: Any, name: str, folder: Path) -> None:
    """A candidate that passed the gate and waits for a person; its time is over, and it would win."""
    answers = folder.parent / f"{name}/predictions.jsonl"
    answers.parent.mkdir()
    answers.write_text('{"id": "1"}\n')
    candidate = promotion.Candidate(name, Agents(name * 32, name * 32), answers, {"reason": f"{name} gains"})
    version = promotion.register(registry, candidate, renew=True)
    before = registry.champion().number
    promotion.await_approval(registry, version, promotion.Approval(1e-9, "promote"), before, None)


def registry_of(client: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The team's registry with this account's rights."""
    for name, value in client.items():
        monkeypatch.setenv(name, value)
    return Registry()


def backup(found: Team, what: str) -> str:
    return found.script("backup.py", "--folder", str(found.folder / "backups"), what, server="backup")


def champion(found: Team, client: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The number of the champion's version, with its answers read from S3 through MLflow."""
    registry = registry_of(client, monkeypatch)
    version = registry.champion()
    assert version and registry.predictions(version)
    return version.number
