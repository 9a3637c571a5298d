"""The xLSTM of Hugging Face transformers, `models/xlstm`, on `xk.mlstm` and `xk.mlstm_step`.

Prefill and training then take any length (transformers' own training asks for multiples of the
chunk size), and the cache that a model makes holds float32 states, which transformers would round
to the dtype of the embeddings at every call.

Where the package `xlstm` is installed transformers builds its layers from that; they are replaced
as layers of `mlstm_kernels`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .mlstm_kernels import run_backend
from .swap import Found, Swap, Swapped, fused_backend, no_kernel, swapped_class

MODELING = "transformers.models.xlstm.modeling_xlstm"


class FusedXLSTMBackend(Swapped):
    """`xLSTMBackend`: its arguments and returns, one call of ours."""

    config: Any

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        igate: Tensor,
        fgate: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: str | None = None,
    ) -> Any:
        state = c_initial, n_initial, m_initial
        tensors: Any = (query, key, value, igate, fgate, *state)
        if not query.is_cpu:
            return self.replaced.forward(self, *tensors, return_last_states, mode)
        return run_backend(self.config, tensors, return_last_states, mode)


class FusedXLSTMModel(Swapped):
    """`xLSTMModel` with a cache of float32 states where it makes the cache itself."""

    config: Any
    training: bool
    gradient_checkpointing: bool
    embeddings: nn.Embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        given = inputs_embeds if input_ids is None else input_ids
        if cache_params is None and given is not None and self._makes_cache(given, use_cache):
            cache = sys.modules[MODELING].xLSTMCache
            dtype = torch.float64 if self.embeddings.weight.dtype == torch.float64 else None
            cache_params = cache(
                self.config, given.shape[0], dtype=dtype or torch.float32, device=given.device
            )
        forward: Any = self.replaced.forward
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        return forward(self, cache_params=cache_params, **kwargs)

    def _makes_cache(self, given: Tensor, use_cache: bool | None) -> bool:
        if self.training and self.gradient_checkpointing:
            return False
        in_pieces = not self.training and given.shape[1] > self.config.max_inference_chunksize
        return in_pieces or (self.config.use_cache if use_cache is None else use_cache)


KNOWN = (f"{MODELING}.xLSTMBackend", f"{MODELING}.xLSTMModel")


def find(layer: nn.Module) -> Found:
    weight = next(layer.parameters(), torch.empty(0))
    backend = fused_backend("mlstm", weight)
    if backend is None:
        return no_kernel("mlstm", weight)
    if (name := type(layer).__name__) == "xLSTMModel":
        # save_pretrained writes the name of the class.
        become = swapped_class(FusedXLSTMModel, type(layer), name)
        return Swap(become, backend, "its cache keeps float32 states")
    become = swapped_class(FusedXLSTMBackend, type(layer))
    return Swap(become, backend, "every call on CPU tensors")
