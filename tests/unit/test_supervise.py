"""What the supervisor between the flow and `dvc` ends, and what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from flows.supervise import LINGERS
from models.engines.keeper import MARK
from tests.support.imports import REPOSITORY

STAGE = """
import os, subprocess, sys, time
for name, mark in (("left", {}), ("lingering", {"LONGVIEW_LINGERS": "1"})):
    code = "import subprocess; subprocess.run(['sleep', '60'], env={})"  # its own child carries no mark
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, env={**os.environ, **mark})
    open(name, "w").write(str(child.pid))
time.sleep(1)
if "hang" in sys.argv:
    time.sleep(60)
"""


def supervise(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(REPOSITORY / "flows/supervise.py"), str(os.getpid()), "--"]
    return subprocess.Popen([*command, sys.executable, "-c", STAGE, *arguments], cwd=folder)


def alive(folder: Path, name: str) -> bool:
    return psutil.pid_exists(int((folder / name).read_text()))


def test_a_server_that_lingers_stays_when_its_stage_has_ended_and_nothing_else(tmp_path: Path) -> None:
    assert LINGERS == MARK
    assert supervise(tmp_path).wait(30) == 0
    assert not alive(tmp_path, "left") and alive(tmp_path, "lingering")
    keeper = psutil.Process(int((tmp_path / "lingering").read_text()))
    (child,) = keeper.children()
    for process in (child, keeper):
        process.kill()


def test_when_the_flow_is_stopped_all_ends(tmp_path: Path) -> None:
    supervisor = supervise(tmp_path, "hang")
    while not (tmp_path / "lingering").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    supervisor.terminate()
    supervisor.wait(30)
    assert not alive(tmp_path, "left") and not alive(tmp_path, "lingering")
