"""Commands that start others: output goes to files, and nothing of them is left when their time is over.

    done = run([sys.executable, "-m", "flows.cli", "run"], cwd=clone, env=environment, timeout_s=900)

A pipe would be read until the last process that has it is gone, whatever became of the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest
from click.testing import Result


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """The command's status and output. Fails the test, with the end of the output, if it takes longer."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True)
        try:
            status = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    if status is None:
        pytest.fail(
            f"{' '.join(command)}: still running after {timeout_s:.0f} s\n{said[0][-3000:]}{said[1][-3000:]}"
        )
    return subprocess.CompletedProcess(command, status, *said)


def longview(*arguments: str) -> Result:
    """The command `longview` in this process, whose environment is afterwards as it was before."""
    from typer.testing import CliRunner

    from flows.cli import app

    with mock.patch.dict(os.environ):
        return CliRunner().invoke(app, list(arguments))
