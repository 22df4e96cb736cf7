"""A journal of finished work in batches: what is in it is never asked of an engine again.

    journal = Journal(".work/generate/ab12/journal.jsonl")
    results = [journal.once(key, lambda: expensive(batch)) for key, batch in batches]

Keyed by the content that was asked, appended and fsynced after each batch;
a line cut off by a kill is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Results of batches by key, on disk. Values are JSON."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, Any] = {}
        self.replayed = 0
        if self.path.exists():
            self._load()

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """The journalled value of the key, or that of work(), made durable before it is returned."""
        if key in self._done:
            self.replayed += 1
            return self._done[key]
        value = work()
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._done[key] = value
        return value

    def _load(self) -> None:
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self._done[row["key"]] = row["value"]
                except (ValueError, KeyError, TypeError):
                    break
                whole += len(line)
        if whole < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(whole)


def key(*parts: Any) -> str:
    """A key for what is asked: a hash of its JSON."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:24]
