"""The direction of the house: flows -> tasks -> models, and who may use which library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import dvc_deps
from tests.support.imports import REPOSITORY, imported, modules

FORBIDDEN = {
    "models": {"flows", "tasks", "prefect", "dvc", "mlflow"},
    "tasks": {"flows", "prefect"},
    "flows": {"torch", "transformers", "trl", "vllm", "peft", "accelerate", "datasets", "models"},
}
STAGES = {dvc_deps.module_of(body) for body in dvc_deps.stages(dvc_deps.load()).values()}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_forbidden_import(package: str) -> None:
    broken = [
        f"{path} imports {name}"
        for path in modules(package)
        for name in imported(path)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_no_stage_imports_another(stage: str) -> None:
    path = stage.replace(".", "/") + ".py"
    if not (REPOSITORY / path).is_file():
        pytest.skip(f"{path} is not written yet")
    others = {name for name in imported(path) if name in STAGES - {stage}}
    assert not others, (
        f"{path} imports {', '.join(others)}: move what they share to models/ or a shared module"
    )


def test_a_scheduler_host_needs_no_training_library() -> None:
    heavy = "torch transformers trl vllm sklearn matplotlib"
    code = f"import sys, flows.cli, flows.retrain; print(*[m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_the_command_line_starts_without_the_three_tools() -> None:
    code = "import sys, flows.cli; print(*[m for m in ('prefect', 'dvc', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_the_mlflow_folder_holds_no_python() -> None:
    assert not list((REPOSITORY / "mlflow").rglob("*.py"))
