"""deploy/team/: what compose.yaml, env.template and the scripts must agree on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from ruamel.yaml import YAML

from tests.support.mini import REPOSITORY

FILES = REPOSITORY / "deploy/team"
TEXT = (FILES / "compose.yaml").read_text()
SERVICES = YAML(typ="safe").load(TEXT)["services"]


def test_every_variable_is_explained_and_every_explained_one_is_used() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    explained = set(re.findall(r"^(\w+)=", (FILES / "env.template").read_text(), flags=re.M))
    assert used == explained


def test_every_file_that_is_mounted_or_built_from_exists() -> None:
    mounted = [v for s in SERVICES.values() for v in s.get("volumes", []) if v.startswith("./")]
    assert mounted
    for volume in mounted:
        path = FILES / volume.split(":")[0]
        assert path.exists() or path.name == "backups", volume  # made by new-env
    for service in SERVICES.values():
        build = service.get("build")
        if build:
            assert (FILES / build["context"] / build["dockerfile"]).resolve().is_file()


def test_servers_wait_for_what_they_need() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            healthy = how["condition"] == "service_healthy"
            assert healthy == ("healthcheck" in SERVICES[needed]), f"{name} waits for {needed}"


def test_versions_are_those_of_the_checkout() -> None:
    pins = dict(re.findall(r'"(mlflow|prefect)==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text()))
    assert f"longview-servers:mlflow-{pins['mlflow']}-prefect-{pins['prefect']}" in TEXT


def test_new_env_makes_passwords_once(tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(FILES, tmp_path / "team", ignore=shutil.ignore_patterns(".env"))
    command = ["sh", str(folder / "new-env")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    written = (folder / ".env").read_text()
    values = dict(line.split("=", 1) for line in written.splitlines() if re.match(r"\w+=", line))
    assert all(values.values()) and len(values["MLFLOW_ADMIN_PASSWORD"]) == 48
    assert (folder / ".env").stat().st_mode & 0o077 == 0
    assert subprocess.run(command, capture_output=True).returncode == 1
    assert (folder / ".env").read_text() == written
