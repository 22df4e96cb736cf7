"""A module's forward, replaced for a while.

with replaced(model.base_model, lambda plain: lambda **inputs: plain(**inputs)):
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Forward = Callable[..., Any]


@contextmanager
def replaced(module: torch.nn.Module, make: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within, forward is make(what it was); these may be nested."""
    before = vars(module).get("forward")
    module.forward = make(module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
