"""What an account of a team's MLflow may not do, without a server.

    refuse_deletes(monkeypatch)

deploy/team/ gives everybody the permission EDIT. With it, MLflow deletes no tag of a version and no alias of
a model that another account made.
"""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

DELETES = ("delete_model_version_tag", "delete_registered_model_alias")


def refuse_deletes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on MLflow's client is refused what a server would refuse."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise MlflowException("Permission denied")

    for name in DELETES:
        monkeypatch.setattr(MlflowClient, name, refuse)
