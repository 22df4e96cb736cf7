"""One real Prefect server for all flow tests, and a miniature project each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import dvc  # noqa: F401  (it logs to the stderr of its first import: not to that of a command under test)
import pytest

from tests.support.mini import make_project


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a temporary Prefect server."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401  (sets what Prefect reads when it is imported)

    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature project to copy."""
    return make_project(tmp_path_factory.mktemp("template") / "project")


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature project that the flows take for the checkout."""
    folder = shutil.copytree(template, tmp_path / "project")
    monkeypatch.setenv("LONGVIEW_ROOT", str(folder))
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    monkeypatch.chdir(folder)
    return folder
