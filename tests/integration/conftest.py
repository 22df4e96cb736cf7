"""What the tests with a real vLLM need."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of the environment that has vLLM; without one these tests fail, and say what to do."""
    python = os.environ.get("VLLM_PYTHON", "")
    if not python:
        pytest.fail(
            "VLLM_PYTHON is not set: it names the interpreter of an environment with vLLM (docs/engines.md); "
            "`make test` makes one"
        )
    return python
