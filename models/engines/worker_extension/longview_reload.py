"""Loaded into vLLM's workers (--worker-extension-cls longview_reload.Reload): new weights, and all of them.

vLLM's own `reload_weights` leaves the output layer of tied embeddings as it was on CPU (0.32): its copy,
packed for the kernels, is made anew only for layers that the checkpoint names, and a tied one is not in it.
Runs in the environment that has vLLM, where this folder alone is put on the path: it imports vLLM only.
"""

from __future__ import annotations

from typing import Any


class Reload:
    """A mix-in of vLLM's worker; its methods are called by POST /collective_rpc."""

    reload_weights: Any
    model_runner: Any

    def longview_reload(self, weights_path: str) -> None:
        """`reload_weights`, and the output layer's packed copy; a GPU has none."""
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            UnquantizedEmbeddingMethod,
        )

        self.reload_weights(weights_path=weights_path)
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead) and isinstance(
                layer.quant_method, UnquantizedEmbeddingMethod
            ):
                layer.quant_method.process_weights_after_loading(layer)
