"""The recurrence in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_cpu
from ...memory import address, dense_rows, dtype_code, fresh_cpu, plain, refused_by_cpu
from .arguments import CELL_INDEX, starts_of
from .results import forward_results
from .shapes import last_shape


def supports(x_BTGHD: Tensor, r_GHDE: Tensor, cell: str, save: bool = True) -> str | None:
    return refused_by_cpu(x=x_BTGHD)


def forward(
    x_BTGHD: Tensor,
    r_GHDE: Tensor,
    b_GHD: Tensor | None,
    state_SBHD: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    n_floor: float,
    save: bool,
) -> list[Tensor]:
    _, T, _, H, D = x_BTGHD.shape
    h_BTHD, last_SBHD, saved = forward_results(x_BTGHD, cu_seqlens, cell, save, fresh_cpu)
    dtype, B = last_SBHD.dtype, last_SBHD.shape[1]
    x_BTGHD, starts = dense_rows(x_BTGHD), starts_of(cu_seqlens, T, cell)
    r_GHDE, b_GHD = plain(r_GHDE, dtype), plain(b_GHD, dtype)
    state_SBHD = plain(state_SBHD, dtype)
    if B == 0:
        return [h_BTHD, last_SBHD, *saved]
    load_cpu().recurrence_forward(
        CELL_INDEX[cell],
        dtype_code(x_BTGHD),
        (B, T, H, D),
        address(starts),
        address(x_BTGHD),
        x_BTGHD.stride()[:4],
        address(r_GHDE),
        address(b_GHD),
        address(state_SBHD),
        n_floor,
        address(h_BTHD),
        address(last_SBHD),
        *([address(t) for t in saved] if save else (0, 0)),
    )
    return [h_BTHD, last_SBHD, *saved]


def backward(
    dh_BTHD: Tensor | None,
    dlast_SBHD: Tensor | None,
    r_GHDE: Tensor,
    raw_BTGHD: Tensor,
    checkpoints_NSHD: Tensor,
    cu_seqlens: Tensor | None,
    cell: str,
    n_floor: float,
    clip_grad: float | None,
    like_x: Tensor,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, T, _, H, D = raw_BTGHD.shape
    dtype = raw_BTGHD.dtype
    last = last_shape(raw_BTGHD.shape, cu_seqlens, cell)
    want_r, want_b, want_state = want
    dx_BTGHD = fresh_cpu(raw_BTGHD.shape, like_x.dtype)
    dr_GHDE = torch.empty(r_GHDE.shape if want_r else (0,), dtype=dtype)
    db_GHD = torch.empty(r_GHDE.shape[:3] if want_b else (0,), dtype=dtype)
    dstate_SBHD = torch.empty(last if want_state else (0,), dtype=dtype)
    r_GHDE, dlast_SBHD = plain(r_GHDE, dtype), plain(dlast_SBHD, dtype)
    dh_BTHD, starts = dense_rows(dh_BTHD), starts_of(cu_seqlens, T, cell)
    if last[1] == 0:
        return dx_BTGHD, dr_GHDE.zero_(), db_GHD.zero_(), dstate_SBHD
    load_cpu().recurrence_backward(
        CELL_INDEX[cell],
        dtype_code(like_x),
        (last[1], T, H, D),
        address(starts),
        address(r_GHDE),
        n_floor,
        float("inf") if clip_grad is None else clip_grad,
        address(raw_BTGHD),
        address(checkpoints_NSHD),
        address(dh_BTHD),
        (0, 0, 0) if dh_BTHD is None else dh_BTHD.stride()[:3],
        address(dlast_SBHD),
        address(dx_BTGHD),
        address(dr_GHDE) if want_r else 0,
        address(db_GHD) if want_b else 0,
        address(dstate_SBHD) if want_state else 0,
    )
    return dx_BTGHD, dr_GHDE, db_GHD, dstate_SBHD
