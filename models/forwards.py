"""A module's forward, replaced for a while.

with replaced(backbone(model), lambda plain: lambda **inputs: plain(**inputs)):
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Forward = Callable[..., Any]


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, where adapters (peft) are wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: PreTrainedModel) -> Any:
    """The model without its head: what gives the last hidden states."""
    return unwrapped(model).base_model


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
