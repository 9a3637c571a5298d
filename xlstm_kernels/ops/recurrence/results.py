"""Storage for what forward returns, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cells import compute_dtype
from .shapes import last_shape, saved_shapes

# (shape, dtype) -> a tensor of any values
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


def forward_results(
    x_BTGHD: Tensor, cu_seqlens: Tensor | None, cell: str, save: bool, empty: Empty
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h (B, T, H, D), the last state, and what is saved for the backward, if anything."""
    B, T, _, H, D = x_BTGHD.shape
    dtype = compute_dtype(x_BTGHD.dtype)
    h_BTHD = empty((B, T, H, D), x_BTGHD.dtype)
    last_SBHD = empty(last_shape(x_BTGHD.shape, cu_seqlens, cell), dtype)
    to_save = saved_shapes(x_BTGHD.shape, cu_seqlens, cell) if save else ()
    saved = [empty(shape, dtype) for shape in to_save]
    if save and cu_seqlens is not None:
        saved[1].zero_()  # its last rows belong to no sequence
    return h_BTHD, last_SBHD, saved


def empty_like(x: Tensor) -> Empty:
    """On the device of x."""
    return lambda shape, dtype: x.new_empty(shape, dtype=dtype)
