"""A migrated MLflow store, and a folder that looks like a checkout: used by pytest tests/stages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import tracking

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """One migrated, empty store to copy: the migration takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    code = "from tasks.tracking import client; client()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return folder / tracking.STORE


@pytest.fixture
def checkout(tmp_path, migrated, monkeypatch):
    """A folder that looks like a checkout: data, one input, and its own copy of the store."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "MLFLOW_TRACKING_URI",
        "LONGVIEW_PARENT_RUN_ID",
        "LONGVIEW_TRACKING",
        "LONGVIEW_RECORDER",
        "RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(migrated, tracking.STORE)
    Path("data").mkdir()
    Path("data/records.jsonl").write_text('{"id": "1"}\n{"id": "2"}\n')
    return tmp_path
