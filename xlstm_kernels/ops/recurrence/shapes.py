"""Shapes of what the recurrence returns and saves.

raw          (B, T, G, H, D) compute dtype: x + R h + b
checkpoints  (N, S, H, D) compute dtype: the states before every 16th step of each sequence; row
             b * ceil(T / 16) + t // 16, or starts[b] // 16 + b + t // 16 for packed sequences
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...cells import CELLS

CHECKPOINT_INTERVAL = 16  # csrc/launch.h: kCheckpointInterval


def last_shape(shape: Sequence[int], cu_seqlens: Tensor | None, cell: str) -> tuple[int, ...]:
    """(S, B, H, D) of the last state for x or raw of `shape`; B counts sequences."""
    B, _, _, H, D = shape
    return CELLS[cell].states, B if cu_seqlens is None else cu_seqlens.shape[0] - 1, H, D


def saved_shapes(
    shape: Sequence[int], cu_seqlens: Tensor | None, cell: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (raw, checkpoints) for x of `shape`."""
    _, T, _, H, D = shape
    S, B, _, _ = last_shape(shape, cu_seqlens, cell)
    if cu_seqlens is None:
        rows = B * ((T + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL)
    else:
        rows = T // CHECKPOINT_INTERVAL + B
    return tuple(shape), (rows, S, H, D)
