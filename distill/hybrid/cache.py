"""The cache of a hybrid model: one state a layer, of constant size, in transformers' interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from distill.hybrid.mixer import HybridMixer
from distill.hybrid.options import HybridOptions
from distill.models.state_cache import StateCacheLayer


class HybridCacheLayer(StateCacheLayer):
    """Of a mixer; `state` is a `HybridState`."""

    def run(self, mixer: HybridMixer, tensors: Any, **how: Any) -> Tensor:
        """The mixer's output for the next tokens, which the state then holds."""
        if self.state is None:
            h_BTHD, self.state = mixer.prefill(*tensors, **how)
        else:
            h_BTHD, self.state = mixer.step(*(*tensors, self.state), **how)
        self.seen += h_BTHD.shape[1]
        return h_BTHD


class HybridCache(Cache):
    """A `HybridCacheLayer` for each layer that has a mixer, transformers' own for the others."""

    def __init__(self, config: PretrainedConfig):
        layers = list(DynamicCache(config=config).layers)
        for index in HybridOptions.from_dict(config.hybrid).replaced(len(layers)):
            layers[index] = HybridCacheLayer()
        super().__init__(layers=layers)
