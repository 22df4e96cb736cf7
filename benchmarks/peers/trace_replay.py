"""A logits processor that has a model in vLLM write a trace: a file says what to write after which prompt.

    TRACE_REPLAY=script.json PYTHONPATH=benchmarks/peers \\
        vllm serve MODEL --logits-processors trace_replay:TraceReplay

The file holds [[ids of the prompt, ids of the text], ...]. The model computes each token as ever; then the
one that the trace has is the only one that can be drawn. Where a prompt stands there several times its
texts take turns; after one that does not stand there the model writes what it likes.
"""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class TraceReplay(LogitsProcessor):
    """Rows of a batch and what is to be written in them."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.texts: dict[tuple[int, ...], deque[list[int]]] = {}
        for prompt, text in json.loads(Path(os.environ["TRACE_REPLAY"]).read_text()):
            self.texts.setdefault(tuple(prompt), deque()).append(text)
        self.rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.rows, batch_update, self._begin)

    def _begin(
        self, parameters: Any, prompt: list[int] | None, written: list[int]
    ) -> tuple[list[int], list[int]] | None:
        """The next text of the prompt; of a request that goes on, one that goes on like this."""
        texts = self.texts.get(tuple(prompt or ()), deque())
        for _ in texts:
            texts.rotate(-1)
            if texts[-1][: len(written)] == written:
                return texts[-1], written
        return None

    def apply(self, logits: Any) -> Any:
        if self.rows:
            rows = list(self.rows)
            tokens = [text[min(len(written), len(text) - 1)] for text, written in self.rows.values()]
            logits[rows] = float("-inf")
            logits[rows, tokens] = 0.0
        return logits
