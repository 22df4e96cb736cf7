"""Prefect's part: when, where and whether to try again. Imports tasks, dvc, mlflow; never torch or trl.

Prefect reads its settings from the environment when it is first imported, so they are set here, before any
module of this package can import it. Values the user has set are kept.
"""

from flows.environment import prepare

prepare()
