"""One tiny tokenizer, processor and model for all tests that need real ones, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support import tiny_vlm


@pytest.fixture(scope="session")
def tiny_processor() -> Any:
    """Processor of the embedded model's kind, with a tokenizer trained on a few lessons."""
    return tiny_vlm.processor()


@pytest.fixture
def tiny_model(tiny_processor: Any) -> Callable[..., Any]:
    """tiny_model(seed=0): a new random model; the same seed gives the same weights."""
    return lambda seed=0: tiny_vlm.model(tiny_processor, seed)
