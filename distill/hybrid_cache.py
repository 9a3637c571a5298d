"""The cache of a hybrid model: one state a layer, of constant size, in transformers' interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from distill.mixer import HybridMixer, HybridOptions, HybridState


class HybridCacheLayer(CacheLayerMixin):
    """`state` after `seen` tokens, None before the first."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: HybridState | None = None
        self.seen = 0

    def run(self, mixer: HybridMixer, tensors: Any, scale: float) -> Tensor:
        """The mixer's output for the next tokens, which the state then holds."""
        if self.state is None:
            h_BTHD, self.state = mixer.prefill(*tensors, scale=scale)
        else:
            h_BTHD, self.state = mixer.step(*(*tensors, self.state), scale=scale)
        self.seen += h_BTHD.shape[1]
        return h_BTHD

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys in a mask, which the layers that are attention share."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1  # none

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = pytree.tree_map_only(Tensor, function, self.state)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("HybridCacheLayer: its state is made by the mixer's prefill")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("HybridCacheLayer: its state goes on by `run`, not by keys")


class HybridCache(Cache):
    """A `HybridCacheLayer` for each layer that has a mixer, transformers' own for the others."""

    def __init__(self, config: PretrainedConfig):
        layers = list(DynamicCache(config=config).layers)
        for index in HybridOptions.from_dict(config.hybrid).replaced(len(layers)):
            layers[index] = HybridCacheLayer()
        super().__init__(layers=layers)
