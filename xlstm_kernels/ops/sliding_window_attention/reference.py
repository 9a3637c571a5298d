"""Softmax attention over a window and the first tokens, in plain torch: as many queries at a time
as the window is long, against the keys that any of them sees. Time and memory are linear in T."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import compute_dtype
from .shapes import Window, sequences, visible


def forward(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, window: Window, starts: list[int] | None
) -> Tensor:
    dtype = compute_dtype(q_BTHD.dtype)
    q, k, v = (x.to(dtype) for x in (q_BTHD, k_BTGD, v_BTGE))
    return sequences(_sequence, q, k, v, window, starts).to(v_BTGE.dtype)


def _sequence(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, window: Window) -> Tensor:
    repeat = q_BTHD.shape[2] // k_BTGD.shape[2]
    k_BTHD, v_BTHE = (x.repeat_interleave(repeat, dim=2) for x in (k_BTGD, v_BTGE))
    T, device = q_BTHD.shape[1], q_BTHD.device
    parts = []
    for begin in range(0, T, window.size):
        t = torch.arange(begin, min(begin + window.size, T), device=device)
        nearest = max(begin - window.size + 1, 0)
        j = torch.arange(nearest, begin + len(t), device=device)
        j = torch.cat([torch.arange(min(window.sinks, nearest), device=device), j])
        scores = torch.einsum("bthd,bjhd->bhtj", q_BTHD[:, t], k_BTHD[:, j]) * window.scale
        scores = scores.masked_fill(~visible(t, j, window), float("-inf"))
        parts.append(torch.einsum("bhtj,bjhe->bthe", scores.softmax(-1), v_BTHE[:, j]))
    return torch.cat(parts, dim=1)
