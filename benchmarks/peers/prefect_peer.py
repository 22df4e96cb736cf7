"""The plain combination: a Prefect flow with one task a stage, each `dvc repro --single-item STAGE`.

python benchmarks/peers/prefect_peer.py STAGE...        # in order, in the folder of dvc.yaml
"""

from __future__ import annotations

import subprocess
import sys

from prefect import flow, task
from prefect.cache_policies import NO_CACHE


@task(cache_policy=NO_CACHE)
def stage(name: str) -> None:
    """One stage."""
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--single-item", name], check=True)


@flow
def pipeline(names: list[str]) -> None:
    """All stages."""
    for name in names:
        stage.with_options(task_run_name=name)(name)


if __name__ == "__main__":
    pipeline(sys.argv[1:])
