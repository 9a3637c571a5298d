"""What a token of sliding-window attention sees, and packed sequences one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Tokens of the window, the present one among them; first tokens that are always seen; factor
    of the scores."""

    size: int
    sinks: int
    scale: float


def visible(t: Tensor, j: Tensor, window: Window) -> Tensor:
    """(t, j): whether token t sees token j."""
    back = t[:, None] - j[None]
    return (back >= 0) & ((back < window.size) | (j[None] < window.sinks))


# (q, k, v, window) -> h, of sequences that are not packed
Form = Callable[[Tensor, Tensor, Tensor, Window], Tensor]


def sequences(
    form: Form, q: Tensor, k: Tensor, v: Tensor, window: Window, starts: list[int] | None
) -> Tensor:
    """h (B, T, H, E) by `form`, of each packed sequence apart where there are any."""
    spans = [(0, q.shape[1])] if starts is None else list(pairwise(starts))
    parts = [
        form(q[:, begin:end], k[:, begin:end], v[:, begin:end], window)
        for begin, end in spans
        if end > begin
    ]
    if not parts:
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    return torch.cat(parts, dim=1)


# Queries whose share of the first tokens' gradients is summed together.
SPAN = 1024


def cut(starts: list[int], size: int) -> list[list[int]]:
    """Packed sequences cut into tiles of `size` tokens: of each tile where its sequence begins and
    how long that is, the tile's first token in it, and how many spans lie before the sequence."""
    rows, spans = [], 0
    for begin, end in pairwise(starts):
        rows += [[begin, end - begin, first, spans] for first in range(0, end - begin, size)]
        spans += -(-(end - begin) // SPAN)
    return rows
