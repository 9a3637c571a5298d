"""The recurrence over time in plain torch, any float dtype: the oracle of every other backend.

raw_t = x_t + R h_{t-1} + b            R block-diagonal over heads
h_t, c_t, ... = cell.step(raw_t, state_{t-1})
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...arguments import token_starts
from ...cells import CELLS, compute_dtype, no_autocast, no_tokens
from .shapes import last_shape


class ClipGrad(torch.autograd.Function):
    """The identity, whose gradient is clipped to +-bound element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx.clamp(-ctx.bound, ctx.bound), None


def forward(
    x_BTGHD: Tensor,
    r_GHDE: Tensor,
    b_GHD: Tensor | None,
    state_SBHD: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    n_floor: float,
    clip_grad: float | None,
) -> tuple[Tensor, Tensor]:
    """h (B, T, H, D) in x's dtype and the last state (S, B, H, D) in the compute dtype."""
    with no_autocast(x_BTGHD.device):
        if cu_seqlens is None:
            return _scan(x_BTGHD, r_GHDE, b_GHD, state_SBHD, cell, n_floor, clip_grad)
        return _scan_packed(
            x_BTGHD, r_GHDE, b_GHD, state_SBHD, cu_seqlens, cell, n_floor, clip_grad
        )


def _scan_packed(
    x_BTGHD: Tensor,
    r_GHDE: Tensor,
    b_GHD: Tensor | None,
    state_SBHD: Tensor | None,
    cu_seqlens: Tensor,
    cell: str,
    n_floor: float,
    clip_grad: float | None,
) -> tuple[Tensor, Tensor]:
    starts = token_starts(CELLS[cell].function, cu_seqlens, x_BTGHD.shape[1])
    if len(starts) == 1:  # no sequence
        _, _, _, H, D = x_BTGHD.shape
        last_SBHD = x_BTGHD.new_zeros(last_shape(x_BTGHD.shape, cu_seqlens, cell))
        h_BTHD = no_tokens(x_BTGHD.new_zeros(1, 0, H, D), x_BTGHD, r_GHDE, b_GHD, state_SBHD)
        return h_BTHD, last_SBHD.to(compute_dtype(x_BTGHD.dtype))
    runs = [
        _scan(
            x_BTGHD[:, begin:end],
            r_GHDE,
            b_GHD,
            None if state_SBHD is None else state_SBHD[:, row : row + 1],
            cell,
            n_floor,
            clip_grad,
        )
        for row, (begin, end) in enumerate(pairwise(starts))
    ]
    h, last = zip(*runs, strict=True)
    return torch.cat(h, dim=1), torch.cat(last, dim=1)


def _scan(
    x_BTGHD: Tensor,
    r_GHDE: Tensor,
    b_GHD: Tensor | None,
    state_SBHD: Tensor | None,
    cell: str,
    n_floor: float,
    clip_grad: float | None,
) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = x_BTGHD.shape
    dtype = compute_dtype(x_BTGHD.dtype)
    spec = CELLS[cell]
    r_GHDE = r_GHDE.to(dtype)
    if b_GHD is not None:
        b_GHD = b_GHD.to(dtype)
    if state_SBHD is None:
        state_SBHD = x_BTGHD.new_zeros(spec.states, B, H, D, dtype=dtype)
    state = state_SBHD.unbind(0)
    h_T = []
    for t in range(T):
        h_BHE = state[0] if clip_grad is None else ClipGrad.apply(state[0], clip_grad)
        raw_BGHD = x_BTGHD[:, t].to(dtype) + torch.einsum("ghde,bhe->bghd", r_GHDE, h_BHE)
        if b_GHD is not None:
            raw_BGHD = raw_BGHD + b_GHD
        state = spec.step(raw_BGHD, state, n_floor)
        h_T.append(state[0].to(x_BTGHD.dtype))
    if h_T:
        h_BTHD = torch.stack(h_T, dim=1)
    else:
        h_BTHD = no_tokens(x_BTGHD.new_zeros(B, 0, H, D), x_BTGHD, r_GHDE, b_GHD, state_SBHD)
    return h_BTHD, torch.stack(state)
