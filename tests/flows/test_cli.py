"""`longview`: help, status, the way out when nothing is to be done, servers, clear refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mini import REPOSITORY, executed, flow_environment

pytestmark = pytest.mark.flows
COMMANDS = [
    ["run"],
    ["status"],
    ["report"],
    ["up"],
    ["down"],
    ["doctor"],
    ["compare"],
    ["explain"],
    ["gc"],
    ["deploy"],
    ["worker"],
    ["data", "import"],
    ["data", "check"],
    ["data", "versions"],
    ["data", "diff"],
    ["data", "rollback"],
    ["model", "list"],
    ["model", "approve"],
    ["model", "promote"],
    ["model", "rollback"],
]


def longview(project: Path, *arguments: str, server: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = flow_environment(project) | ({"PREFECT_API_URL": server} if server else {})
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(command: list[str]) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    shown = CliRunner().invoke(app, [*command, "--help"])
    assert (
        shown.exit_code == 0 and "Example" in shown.output and f"longview {' '.join(command)}" in shown.output
    )


def test_run_status_and_run_again(project: Path, prefect_server: str) -> None:
    before = longview(project, "status")
    assert before.returncode == 0 and "missing" in before.stdout
    done = longview(project, "run", server=prefect_server)
    assert done.returncode == 0 and "5 stages run" in done.stdout, done.stdout + done.stderr
    assert "stage first at work" in done.stdout and "git add dvc.lock" not in done.stdout
    again = longview(project, "run")  # no server: none is needed
    assert again.returncode == 0 and "everything is up to date" in again.stdout
    assert len(executed(project)) == 5
    assert "compare" in longview(project, "report").stdout
    (project / "data/records.jsonl").write_text("more\n")
    after = longview(project, "status").stdout
    assert "stale" in after and "waits" in after


def test_faults_are_one_message_and_no_traceback(project: Path, prefect_server: str) -> None:
    for arguments, words in (
        (["run", "--until", "nothing"], "no stage 'nothing'"),
        (["run", "--profile", "nothing"], "no profile 'nothing'"),
        (["report"], "no results yet"),
        (["data", "check", "nowhere"], "no folder"),
    ):
        done = longview(project, *arguments, server=prefect_server)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    (project / "control/side.fail").write_text("broken on purpose")
    failed = longview(project, "run", "--until", "side", server=prefect_server)
    assert failed.returncode == 1 and "stage 'side'" in failed.stderr
    assert "broken on purpose" in failed.stderr and "Traceback" not in failed.stderr + failed.stdout


@pytest.mark.slow
def test_up_and_down(project: Path) -> None:
    import json
    import urllib.request

    try:
        up = longview(project, "up")
        assert up.returncode == 0, up.stderr
        entries = json.loads((project / ".work/servers.json").read_text())
        for name, health in (("prefect", "/api/health"), ("mlflow", "/health")):
            assert entries[name]["url"].startswith("http://127.0.0.1:") and entries[name]["url"] in up.stdout
            assert urllib.request.urlopen(entries[name]["url"] + health, timeout=5).status == 200
        assert longview(project, "up").stdout == up.stdout
        assert "every run" not in longview(project, "doctor").stdout
    finally:
        down = longview(project, "down")
    assert down.stdout.count("stopped") == 2
    assert "no servers" in longview(project, "down").stdout


def test_the_pins_of_this_environment_are_met() -> None:
    from flows import checks

    (finding,) = checks.packages(REPOSITORY)
    assert finding.level == "ok", finding


@pytest.mark.parametrize(
    ("change", "said"),
    [("rm -r data", "not here yet"), ("echo >> data/records.jsonl", "stale: data modified")],
)
def test_status_says_what_is_the_matter_with_the_data(project: Path, change: str, said: str) -> None:
    import subprocess

    subprocess.run(["sh", "-c", change], cwd=project, check=True)
    assert said in longview(project, "status").stdout
