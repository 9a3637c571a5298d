"""Shapes of what the mLSTM returns and saves.

row_m, row_den   (B, T, H) compute dtype: m and the signed normaliser at each token
c, n, m saved    (N, H, K, V), (N, H, K), (N, H) compute dtype: the states before every 512th token
                 of each sequence; row b * ceil(T / 512) + t // 512, or
                 starts[b] // 512 + b + t // 512 for packed sequences
"""

from __future__ import annotations

from torch import Tensor

STATE_INTERVAL = 512  # csrc/launch.h: kStateInterval

Shape = tuple[int, ...]


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def state_shapes(rows: int, q: Tensor, v: Tensor) -> tuple[Shape, Shape, Shape]:
    """Shapes of (c, n, m) of `rows` sequences."""
    _, _, H, K = q.shape
    return (rows, H, K, v.shape[3]), (rows, H, K), (rows, H)


def saved_shapes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Shape, ...]:
    """Shapes of (row_m, row_den, c, n, m) that forward saves."""
    B, T, H, _ = q.shape
    if cu_seqlens is None:
        rows = B * ((T + STATE_INTERVAL - 1) // STATE_INTERVAL)
    else:
        rows = T // STATE_INTERVAL + sequences(q, cu_seqlens)
    return (B, T, H), (B, T, H), *state_shapes(rows, q, v)
