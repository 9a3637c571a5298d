"""States of constant size as a layer of transformers' caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import CacheLayerMixin


class StateCacheLayer(CacheLayerMixin):
    """`state` after `seen` tokens, None before the first: tensors whose first axis is the batch."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

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
        raise NotImplementedError(f"{type(self).__name__}: its state is made by the first tokens")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: its state goes on by `run`, not by keys")
