"""Vision pre-training of the embedded model: its tower and connector learn what stands in each cell and
where, as the towers of large models come pre-trained (SigLIP and the like).

    align_vision(model, pixel_values, digits, Alignment(), seed=0)

Two linear heads read the connector's output tokens, one for the digit and
one for the cell; they are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Alignment:
    """Steps and rate of vision pre-training; `place_weight` weighs the cell loss against the digit loss."""

    steps: int = 500
    batch_size: int = 48
    learning_rate: float = 2e-3
    place_weight: float = 0.3


def align_vision(
    model: PreTrainedModel,
    pixel_values: Callable[[list[int]], torch.Tensor],
    digits: torch.Tensor,
    settings: Alignment,
    seed: int,
    report: Callable[[float, int, int], None] | None = None,
) -> float:
    """Train the vision tower and the connector in place; returns the last loss.
    Raises TrainingError if nothing moved or a loss is not finite.

    pixel_values(indices): images [n, 3, height, width]; digits: [images,
    cells], in the order of the image tokens.
    """
    import torch
    from torch.nn import functional

    from models.guard import Guard, TrainingError

    if settings.steps < 1:
        raise TrainingError("vision pre-training of 0 steps trains nothing: set foundation.vision.steps")
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    hidden, cells = model.config.text_config.hidden_size, digits.shape[1]
    what, where = torch.nn.Linear(hidden, 10), torch.nn.Linear(hidden, cells)
    tower, connector = model.model.vision_model, model.model.connector
    weights = [p for part in (tower, connector, what, where) for p in part.parameters()]
    trained = torch.nn.ModuleList([tower, connector])
    guard = Guard(trained)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    places = torch.arange(cells).repeat(settings.batch_size)
    value = float("nan")
    for step in range(settings.steps):
        chosen = torch.randint(len(digits), (settings.batch_size,), generator=draw)
        tokens = connector(tower(pixel_values=pixel_values(chosen.tolist())).last_hidden_state)
        loss = functional.cross_entropy(what(tokens).flatten(0, 1), digits[chosen].flatten())
        loss = loss + settings.place_weight * functional.cross_entropy(where(tokens).flatten(0, 1), places)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        value = float(loss.detach())
        guard.log({"loss": value, "grad_norm": float(norm)}, step + 1)
        if report and (step + 1) % 20 == 0:
            report(value, step + 1, settings.steps)
    guard.finish(trained, settings.steps)
    return value
