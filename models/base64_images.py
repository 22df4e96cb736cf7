"""Images as base64 by id, as MIMIC-IT files hold them: in a JSON object, or in parquet that is read lazily.

python -c "from models.base64_images import ParquetImages; print(len(ParquetImages('images.parquet')))"
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

ROW_GROUP = 64
ROW_GROUP_CHARS = 2**24
"""Images, and characters of base64, at which a row group ends: what one lazy access reads."""
KEPT_BYTES = 2**28
"""Row groups kept in memory: training draws images in random order, and reads one for each that is not."""
INDEX_NAMES = ("image_id", "__index_level_0__", "id", "index")

BAD_BASE64 = "not base64"


class MimicItError(ValueError):
    """A file or an image that cannot be used; the message says which and why."""


def write_parquet_images(path: str | Path, images: Mapping[str, bytes]) -> None:
    """{id: bytes} as parquet that pandas reads as a frame with index image_id and column base64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    schema = pa.schema([("base64", pa.string()), ("image_id", pa.string())], {b"pandas": _PANDAS_INDEX})
    names = sorted(images)
    with pq.ParquetWriter(temporary, schema, compression="zstd", compression_level=3) as writer:
        for texts, group in _row_groups(names, images):
            writer.write_table(pa.table([texts, group], schema=schema))
    temporary.replace(path)


def _row_groups(names: Sequence[str], images: Mapping[str, bytes]) -> Iterator[tuple[list[str], list[str]]]:
    texts: list[str] = []
    group: list[str] = []
    for name in names:
        texts.append(encode_base64(images[name]))
        group.append(name)
        if len(group) == ROW_GROUP or sum(map(len, texts)) > ROW_GROUP_CHARS:
            yield texts, group
            texts, group = [], []
    if group:
        yield texts, group


def _column(name: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "field_name": name,
        "pandas_type": "unicode",
        "numpy_type": "object",
        "metadata": None,
    }


_PANDAS_INDEX = json.dumps(
    {
        "index_columns": ["image_id"],
        "column_indexes": [_column(None) | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [_column("base64"), _column("image_id")],
        "creator": {"library": "longview", "version": "1"},
        "pandas_version": "2.0.0",
    }
).encode()
"""What tells pandas which column is the index; fixed, as it is part of the bytes."""


def encode_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def decode_base64(text: str) -> bytes:
    """Bytes of base64, standard or URL-safe, with or without padding, line breaks and "data:...,"."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MimicItError(f"{BAD_BASE64}: {error}") from error


_URL_SAFE = str.maketrans("-_", "+/")


class JsonImages(Mapping[str, bytes]):
    """Images of {id: base64}, all of it in memory: JSON has no other way."""

    def __init__(self, encoded: Mapping[str, Any]) -> None:
        self._encoded = encoded

    def __getitem__(self, name: str) -> bytes:
        text = self._encoded[name]
        if not isinstance(text, str):
            raise MimicItError(f"image {name}: {BAD_BASE64}: {type(text).__name__}")
        return decode_base64(text)

    def __contains__(self, name: object) -> bool:
        return name in self._encoded

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoded)

    def __len__(self) -> int:
        return len(self._encoded)


class ParquetImages(Mapping[str, bytes]):
    """Images of a parquet file: ids in memory, pixels read by row group, the groups used last kept."""

    def __init__(self, path: str | Path, kept_bytes: int = KEPT_BYTES) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise MimicItError(f"{path}: {error}") from error
        names = self._file.schema_arrow.names
        index = next((name for name in INDEX_NAMES if name in names), None)
        if "base64" not in names or index is None:
            raise MimicItError(f"{path}: needs the column base64 and the index image_id, has {names}")
        ids = iter(self._file.read(columns=[index]).column(0).to_pylist())
        sizes = [self._file.metadata.row_group(group) for group in range(self._file.num_row_groups)]
        self._places: dict[str, tuple[int, int]] = {}
        for group, size in enumerate(sizes):
            for row in range(size.num_rows):
                self._places.setdefault(str(next(ids)), (group, row))
        largest = max([1, *(size.total_byte_size for size in sizes)])
        self._group = lru_cache(maxsize=max(1, kept_bytes // largest))(self._read_group)

    def _read_group(self, group: int) -> Any:
        return self._file.read_row_group(group, columns=["base64"]).column(0)

    def __getitem__(self, name: str) -> bytes:
        group, row = self._places[name]
        text = self._group(group)[row].as_py()
        if isinstance(text, bytes):
            text = text.decode("ascii", "replace")
        if not isinstance(text, str):
            raise MimicItError(f"image {name}: {BAD_BASE64}: {type(text).__name__}")
        return decode_base64(text)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
