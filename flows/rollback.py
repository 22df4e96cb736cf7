"""The flow that goes back to an earlier run: `longview data rollback`, for a deployment.

longview data rollback run/20261123-1a2b3c4d        # the same without Prefect
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.environment import root
from flows.restoring import restore, summary


@flow(name="rollback", persist_result=False)
def rollback(revision: str, with_code: bool = False) -> dict[str, Any]:
    """Restore the data, derived sets and checkpoints of an earlier run; retrain nothing.

    Args:
        revision: A run's tag or id, `latest`, a git revision, or the md5 of a data version.
        with_code: Restore the code that the stages read, too, where it differs.
    """
    done = restore(root(), revision, with_code=with_code)
    create_markdown_artifact(summary(done), key="rollback", description=f"back to {done.tag}")
    return asdict(done)
