"""Encoded rows on disk: what a trainer reads, in memory only where it is read.

dataset, too_long = encoded(encode_rows, encoder, conversations, max_tokens, ".work/sft")

A row of token ids takes tens of kilobytes as Python numbers, and every process has all of them: a hundred
thousand pairs with real images would not fit in the memory of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from models.distributed import rank

if TYPE_CHECKING:
    from datasets import Dataset

    from models.vlm import Encoder

Row = dict[str, Any]
Item = TypeVar("Item")
Encode = Callable[["Encoder", Sequence[Item], int], tuple[list[Row], int]]
"""encode(encoder, items, max_tokens): rows, and how many were too long."""
CHUNK = 500
"""Items encoded at a time."""


def encoded(
    encode: Encode[Item], encoder: Encoder, items: Sequence[Item], max_tokens: int, folder: str | Path
) -> tuple[Dataset, int]:
    """The rows as a data set that is mapped from a file in `folder`, and how many items were too long.
    Empty where there are none."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    path, too_long, writer = Path(folder) / f"rows.{rank()}.arrow", 0, None
    path.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(items), CHUNK):
        rows, long = encode(encoder, items[start : start + CHUNK], max_tokens)
        too_long += long
        for row in rows:
            writer = writer or ArrowWriter(path=str(path), features=_features(row))
            writer.write(row)
    if writer is None:
        return Dataset.from_list([]), too_long
    writer.finalize()
    return Dataset.from_file(str(path)), too_long


def _features(row: Row) -> Any:
    """Columns: names of pictures are texts, token ids and labels 32 bits."""
    from datasets import Features, List, Value

    def feature(name: str, value: Any) -> Any:
        kind = Value("string" if name in ("images", "pictures") else "int32")
        return List(kind) if isinstance(value, list) else kind

    return Features({name: feature(name, value) for name, value in row.items()})
