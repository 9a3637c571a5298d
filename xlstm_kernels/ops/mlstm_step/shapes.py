"""Shapes and dtypes of a call of a few tokens; a call of one may leave the axis T out.

q, k (B, T, H, K)    v, h (B, T, H, V)    i, f (B, T, H)
next state           (B, H, K, V), (B, H, K), (B, H); with all states T follows B, where q has it.
                     n and m in the compute dtype, and c too, unless it comes in bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import compute_dtype

MAX_TOKENS = 16


def token_count(q: Tensor) -> int:
    return q.shape[1] if q.dim() == 4 else 1


def state_dtypes(q: Tensor, c: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the next c, n and m."""
    dtype = compute_dtype(q.dtype)
    halved = c.dtype == torch.bfloat16 and dtype == torch.float32
    return torch.bfloat16 if halved else dtype, dtype, dtype


def next_shapes(q: Tensor, v: Tensor, all_states: bool) -> tuple[tuple[int, ...], ...]:
    """Of the next c, n and m."""
    rows, (H, K) = q.shape[: q.dim() - 2 if all_states else 1], q.shape[-2:]
    return (*rows, H, K, v.shape[-1]), (*rows, H, K), (*rows, H)


def token_strides(x: Tensor, dims: int) -> tuple[int, ...]:
    """Of B, T and H, in a call whose q has `dims` axes."""
    strides = x.stride()
    return strides[:3] if dims == 4 else (strides[0], 0, strides[1])


def row_strides(state: Sequence[Tensor]) -> list[int]:
    """Of the axis before H, which counts the rows of a pool, or the tokens of all sequences."""
    return [part.stride(axis) for part, axis in zip(state, (-4, -3, -2), strict=True)]
