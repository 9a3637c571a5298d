"""Sliding-window attention by torch's fused attention, a block of queries against its own and the
block of keys before it, and the first tokens: linear in T, where one masked call is quadratic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory import refused_by_cpu
from .shapes import Window, sequences, visible

# Smaller blocks waste less of what they compute, larger ones keep the products busy.
SMALLEST_BLOCK = 128


def supports(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor) -> str | None:
    return refused_by_cpu(q=q_BTHD, k=k_BTGD, v=v_BTGE)


def forward(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, window: Window, starts: list[int] | None
) -> Tensor:
    return sequences(_sequence, q_BTHD, k_BTGD, v_BTGE, window, starts)


def _sequence(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, window: Window) -> Tensor:
    T, size = q_BTHD.shape[1], max(window.size, window.sinks, SMALLEST_BLOCK)
    block = torch.arange(min(size, T), device=q_BTHD.device)
    alone = visible(block, block, window)
    if size >= T:
        return _attend(q_BTHD, k_BTGD, v_BTGE, alone, window.scale)
    padded = [F.pad(x, (0, 0, 0, 0, 0, -T % size)) for x in (q_BTHD, k_BTGD, v_BTGE)]
    q, k, v = padded
    blocks = q.shape[1] // size
    parts = [_attend(q[:, :size], k[:, :size], v[:, :size], alone, window.scale)]
    # The second block may have first tokens within its window, which then count once.
    for begin, end in ((1, 2), (2, blocks)):
        if begin < end:
            some = q[:, begin * size : end * size].unflatten(1, (end - begin, size)).flatten(0, 1)
            keys, values = (_near(x, begin, end, size, window.sinks) for x in (k, v))
            mask = _mask(block, begin, size, window)
            h = _attend(some, keys, values, mask, window.scale)
            parts.append(h.unflatten(0, (-1, end - begin)).flatten(1, 2))
    return torch.cat(parts, dim=1)[:, :T]


def _near(x_BTGD: Tensor, begin: int, end: int, size: int, sinks: int) -> Tensor:
    """Of each block the first tokens, the block before it and its own: (B blocks, ..., G, D)."""
    pairs = x_BTGD[:, (begin - 1) * size : end * size].unfold(1, 2 * size, size).movedim(-1, 2)
    first = x_BTGD[:, None, :sinks].expand(-1, pairs.shape[1], -1, -1, -1)
    return torch.cat([first, pairs], dim=2).flatten(0, 1)


def _mask(block: Tensor, index: int, size: int, window: Window) -> Tensor:
    """Of the block of this index, and of later ones."""
    near = torch.arange(-size, size, device=block.device)
    back = block[:, None] - near[None]
    first = torch.arange(window.sinks, device=block.device)
    beyond = first[None] <= index * size + block[:, None] - window.size
    return torch.cat([beyond, (back >= 0) & (back < window.size)], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    h = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    return h.transpose(1, 2)
