"""Dagster: a job with one op a stage, one after the other, each running its command; all in one process.

python benchmarks/peers/dagster_peer.py STAGES.json    # [[name, command], …], in their folder
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from dagster import In, Nothing, Out, job, op


def stage(name: str, command: str):
    """One op, after the one before it."""

    @op(name=re.sub(r"\W", "_", name), ins={"before": In(Nothing)}, out=Out(Nothing))
    def run():
        subprocess.run(["sh", "-c", command], check=True)

    return run


OPS = [stage(name, command) for name, command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]


@op(out=Out(Nothing))
def start():
    """Where the chain begins."""


@job
def pipeline():
    """All stages."""
    done = start()
    for one in OPS:
        done = one(done)


if __name__ == "__main__":
    sys.exit(0 if pipeline.execute_in_process().success else 1)
