"""Buffers handed to the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import load_cpu

# Below this a buffer comes from the allocator's heap, already mapped.
_HUGE_PAGE_BYTES = 2 << 20


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def fresh_cpu(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor on huge pages where the system grants them: the page faults of a
    large fresh buffer otherwise cost more than the arithmetic that fills it."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= 2 * _HUGE_PAGE_BYTES:
        load_cpu().advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
