"""Training in several processes: which one this is, and weights that DeepSpeed has split between them
(ZeRO-3, arXiv 1910.02054).

    from models.distributed import first, whole
    trainer.train()
    whole(trainer)                  # in the first process the model is again as it came, and trained
    if first():
        save(model)

`accelerate launch` starts the processes (tasks/launch.py); alone, every function here is that of one process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def rank() -> int:
    """Of this process, among those that train together."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this is the process that saves and reports."""
    return rank() == 0


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def zero_stage() -> int:
    """Of DeepSpeed: 1 splits the optimizer's states, 2 gradients too, 3 weights too. 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return 0
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))
    return int(
        json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    )


def compile_nothing() -> None:
    """On a CPU DeepSpeed would build, at its first start, an all-reduce for inference, which training never
    calls: a minute and more, two processes that wait for one, and a lock that a killed build leaves."""
    if zero_stage():
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def share(items: Sequence[T]) -> list[T]:
    """The items of this process, as many as any other's: forward passes under ZeRO-3 are made by all
    processes together. Where they cannot be divided some are taken twice."""
    count = -(-len(items) // processes())
    return [items[(rank() + n * processes()) % len(items)] for n in range(count)]


def form() -> str:
    """Of a checkpoint to resume from: it holds a part for each process, which other processes, or another
    stage of ZeRO, cannot take up. Empty for one process alone."""
    alone = processes() == 1 and not zero_stage()
    return "" if alone else f"{processes()}-zero{zero_stage()}"


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The whole parameter, wherever its parts lie. All processes must ask for it."""
    if not hasattr(parameter, "ds_id"):
        yield parameter.detach()
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        yield parameter.detach()


def whole(trainer: Any) -> None:
    """Bring the weights that DeepSpeed has split back into the model of the first process, plain parameters
    without DeepSpeed's hooks. The others keep nothing that can be used. All processes must call it."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is None:
        return
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    kept: dict[int, torch.nn.Parameter] = {}
    for parameter in model.parameters():
        with gathered(parameter) as data:
            if first():
                kept[id(parameter)] = torch.nn.Parameter(data.cpu().clone(), parameter.requires_grad)
    engine.destroy()
    for module in model.modules() if first() else ():
        own = {name: p if p is None else kept[id(p)] for name, p in module._parameters.items()}
        module._parameters = own  # DeepSpeed's own dictionary stood there
    trainer.deepspeed = trainer.model_wrapped = None
