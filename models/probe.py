"""A probe of a checkpoint: the trainer's own log-probs of a few fixed tokens, in probe.json beside the
weights.

    from models.probe import read_probe, save_with_probe
    save_with_probe(model, processor, "artifacts/reasoning_sft/checkpoint")
    print(read_probe("artifacts/reasoning_sft/checkpoint").log_probs)

An engine that is to serve these weights must give the same tokens the same log-probs
(models.engines.weights): one that serves others, or other images, answers just as readily.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.families import token_types
from models.vlm import Conversation, Encoder, load, save

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

FILE = "probe.json"
SIDE_PX = 56
"""Of the picture: no processor that we know of refuses it."""
TURNS = [
    ("Read row 2 from left to right and say what the sum of 7 and 15 is.", "Row 2: 3, 8, 1. The sum is 22."),
    ("How many of them are greater than 4?", ""),
]
TOKENS = 48
"""Most that are compared, from the end of the prompt back; all stand behind the picture."""
DECIMALS = 4
DOUBLE_BELOW = 100_000_000
"""Parameters. Models smaller than this are probed in double precision, so that the last decimal does not hang
on how memory happened to be aligned; larger ones as they are."""


@dataclass(frozen=True)
class Probe:
    """image: a data URL; turns: as in Conversation, the last one open. tokens: the last ids of the prompt;
    log_probs: the natural logarithm of the probability of each, given all before it."""

    image: str
    turns: list[tuple[str, str]]
    tokens: list[int]
    log_probs: list[float]

    @property
    def prompt(self) -> Conversation:
        """What an engine is asked."""
        return Conversation([self.image], self.turns)


def save_with_probe(model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> None:
    """models.vlm.save, and the probe taken of the model in memory: so that it also speaks for what was
    written. Only of an adapter whose base is held in fewer bits it is taken of what was written: a server has
    the base as it is."""
    import torch

    save(model, processor, folder)
    quantised = getattr(model, "is_loaded_in_4bit", False)
    if hasattr(model, "peft_config") and (quantised or model.dtype != torch.float32):
        model, _ = load(folder)
    text = json.dumps(asdict(take(model, processor)), indent=1)
    (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def carry_over(source: str | Path, target: str | Path) -> None:
    """The probe of a checkpoint that is saved once more, if it has one."""
    if (Path(source) / FILE).exists():
        shutil.copyfile(Path(source) / FILE, Path(target) / FILE)


def take(model: PreTrainedModel, processor: ProcessorMixin) -> Probe:
    """The probe of a model, of one forward with its weights as they are. Also for a peft model."""
    import copy

    import torch

    image = picture_url()
    encoder = Encoder(processor, lambda _: picture())
    encoder.prepare([image])
    prompt = Conversation([image], TURNS)
    ids = encoder.prompt(prompt)
    count = min(TOKENS, ids[::-1].index(processor.image_token_id))
    if sum(p.numel() for p in model.parameters()) < DOUBLE_BELOW:
        model = copy.deepcopy(model).double()
    with _evaluating(model), torch.no_grad():
        device, dtype = model.device, model.dtype
        pixels = {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in encoder.pixels([image]).items()
        }
        row = torch.tensor([ids], device=device)
        inputs = pixels | token_types(processor, row)
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), **inputs).logits[
            0, -count - 1 : -1
        ]
        said = logits.double().log_softmax(-1).gather(1, row[0, -count:, None])[:, 0]
    return Probe(image, TURNS, ids[-count:], [round(value, DECIMALS) for value in said.tolist()])


def read_probe(folder: str | Path) -> Probe | None:
    """The probe of a checkpoint; None if it has none, as a model from a hub. ValueError if it cannot be
    read."""
    try:
        text = (Path(folder) / FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fields = json.loads(text)
        fields["turns"] = [(user, assistant) for user, assistant in fields["turns"]]
        return Probe(**fields)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{Path(folder) / FILE} is no probe ({error}): train again, or remove it") from None


def picture() -> Image:
    """Three gradients: however a processor scales them, they stay what they are."""
    from PIL import Image

    steps: Sequence[int] = range(SIDE_PX)
    pixels = bytes(
        part
        for y in steps
        for x in steps
        for part in (255 * x // SIDE_PX, 255 * y // SIDE_PX, 255 * (x + y) // (2 * SIDE_PX))
    )
    return Image.frombytes("RGB", (SIDE_PX, SIDE_PX), pixels)


def picture_url() -> str:
    """The picture as a data URL."""
    out = io.BytesIO()
    picture().save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    trained = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trained)
