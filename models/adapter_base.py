"""The base of a LoRA adapter: an adapter counts only on the weights that it was trained on.

    note_base("artifacts/reasoning_sft/checkpoint")       # when it is saved: base.json, beside the adapter
    base = base_of("artifacts/reasoning_sft/checkpoint")  # when it is read: BaseChangedError on other weights

peft puts an adapter on any model of fitting shapes and says nothing: the answers would merely be worse.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
"""What peft calls its settings, in a folder with an adapter."""
FILE = "base.json"
BLOCK, BLOCKS = 1 << 16, 64
"""Bytes read at a time, and how often in a file of weights: 4 MB of 5 GB tell trainings apart."""


class BaseChangedError(ValueError):
    """The weights under an adapter are not those that it was trained on."""


def is_adapter(checkpoint: str | Path) -> bool:
    """Whether a checkpoint folder holds an adapter instead of a whole model."""
    return (Path(checkpoint) / ADAPTER_CONFIG).is_file()


def note_base(checkpoint: str | Path) -> None:
    """Write down which weights lie under the adapter of a folder. Nothing where its base is a hub id."""
    base = _named(checkpoint)
    if Path(base).is_dir():
        text = json.dumps({"weights": weights_digest(base)}, indent=1)
        (Path(checkpoint) / FILE).write_text(text + "\n", encoding="utf-8")


def base_of(checkpoint: str | Path) -> str:
    """Folder or hub id of the model under an adapter. An adapter without base.json, from elsewhere, is taken
    at its word. Raises BaseChangedError."""
    base, note = _named(checkpoint), Path(checkpoint) / FILE
    if note.is_file() and Path(base).is_dir():
        noted = json.loads(note.read_text(encoding="utf-8"))["weights"]
        if noted != weights_digest(base):
            raise BaseChangedError(
                f"{checkpoint} is an adapter trained on other weights than {base} holds now: train it again, "
                "or bring the two of one version with `dvc checkout`"
            )
    return base


def weights_digest(folder: str | Path) -> str:
    """Of all safetensors files of a folder: their names, sizes and BLOCKS evenly spaced blocks of each, the
    first one, with the header, among them."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(start)
                found.update(file.read(BLOCK))
    return found.hexdigest()


def _named(checkpoint: str | Path) -> str:
    text = (Path(checkpoint) / ADAPTER_CONFIG).read_text(encoding="utf-8")
    return str(json.loads(text)["base_model_name_or_path"])
