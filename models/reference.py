"""Log-probabilities of the reference, computed once: batch by batch into a file, which a killed run goes on
from.

    log = ReferenceLog(folder, digest(model, rows, processor))
    log.fill(log.missing(batches), compute)     # compute(batch) -> log-probabilities of chosen, of rejected
    log.values[row]                     # (chosen, rejected) of a row

The file's name is a digest of the model, of the pairs and of the processor: what one of them changed is
another file. A line holds one batch. Numbers are written so that they are read back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Batch = Sequence[int]
Compute = Callable[[Batch], tuple[Sequence[float], Sequence[float]]]


def digest(model: str, rows: Iterable[dict[str, Any]], processor: ProcessorMixin) -> str:
    """Hexadecimal, of what the numbers depend on. model: a digest of its weights; rows: of `encode_pairs`."""
    found = hashlib.blake2b(model.encode(), digest_size=16)
    found.update(processor.image_processor.to_json_string().encode())
    for row in rows:
        found.update(json.dumps([row[key] for key in ("pictures", "prompt", "chosen", "rejected")]).encode())
    return found.hexdigest()


class ReferenceLog:
    """Summed log-probabilities (chosen, rejected) by row: folder/reference-<digest>.<rank>.jsonl, a file for
    each training process, which all of them read."""

    def __init__(self, folder: str | Path, name: str, rank: int = 0) -> None:
        self.folder, self.name = Path(folder), f"reference-{name}"
        self.path = self.folder / f"{self.name}.{rank}.jsonl"
        self.values: dict[int, tuple[float, float]] = {}
        self.computed = 0
        self.read()

    def read(self) -> None:
        """Take what the files hold."""
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            for line in _whole(path).splitlines():
                self.values |= {row: (chosen, rejected) for row, (chosen, rejected) in json.loads(line)}

    def missing(self, batches: Sequence[Batch]) -> list[Batch]:
        """Those of the batches that are not known."""
        return [batch for batch in batches if any(row not in self.values for row in batch)]

    def fill(self, batches: Sequence[Batch], compute: Compute) -> None:
        """Compute the batches. `computed` counts the rows that were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(len(_whole(self.path)))
            for batch in batches:
                chosen, rejected = compute(batch)
                found = dict(zip(batch, zip(chosen, rejected, strict=True), strict=True))
                file.write(json.dumps(list(found.items())).encode() + b"\n")
                file.flush()
                self.values |= found
                self.computed += len(batch)


def _whole(path: Path) -> bytes:
    """The file without a last line that a kill has cut off."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
