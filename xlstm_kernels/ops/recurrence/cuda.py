"""The recurrence in CUDA C++: check, allocate, launch, return.

How heads are dealt to blocks is in `launch.py`. Gates, sums and states are float32, and so is the
accuracy of R h, but for bfloat16 r: there h and the gates' gradients keep 16 bits as operands. With
float32 r both operands keep 11, tf32's, where torch.backends.cuda.matmul.allow_tf32 says so. dR is
a product of what x's dtype leaves of them. One step without a gradient, as a decoder's, has a
kernel of its own, which reads r as it is and needs no memory beside what it returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import cuda_refuses
from ...memory import CPU_DTYPES, address, dense_rows, dtype_code, launching, plain
from .arguments import CELL_INDEX, starts_of
from .launch import (
    BACKWARD,
    COLUMNS,
    EMULATED,
    FORWARD,
    STEP,
    Chip,
    Launch,
    launch_shape,
    widest,
)
from .products import multiply_outer, tf32_allowed
from .results import empty_like, forward_results
from .shapes import CHECKPOINT_INTERVAL, last_shape


def supports(x_BTGHD: Tensor, r_GHDE: Tensor, cell: str, save: bool = True) -> str | None:
    if why := cuda_refuses("x", x_BTGHD.device):
        return why
    if x_BTGHD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x must be float32, bfloat16 or float16, got {x_BTGHD.dtype}"
    chip = _chip(x_BTGHD.device)
    if int(chip.capability.split(".")[0]) < 8:
        return f"it needs a device of compute capability 8.0, x's has {chip.capability}"
    if x_BTGHD.shape[-1] > widest(chip):
        has = f"it has {chip.multiprocessors} multiprocessors"
        return f"D must be at most {widest(chip)} on this device, {has}"
    return None


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
    empty = empty_like(x_BTGHD)
    h_BTHD, last_SBHD, saved = forward_results(x_BTGHD, cu_seqlens, cell, save, empty)
    dtype, B = last_SBHD.dtype, last_SBHD.shape[1]
    x_BTGHD, starts = dense_rows(x_BTGHD), starts_of(cu_seqlens, T, cell)
    r_digits, one_step = _digits(r_GHDE), T == 1 and not save and cu_seqlens is None
    r_GHDE = plain(r_GHDE, CPU_DTYPES[r_digits] if one_step else dtype)
    b_GHD = plain(b_GHD, dtype)
    state_SBHD = plain(state_SBHD, dtype)
    if B == 0:
        return [h_BTHD, last_SBHD, *saved]
    deal = (
        STEP
        if one_step
        else launch_shape(FORWARD, D, _operand(r_digits), B, H, _chip(x_BTGHD.device))
    )
    mail, far = _exchange(deal, x_BTGHD)
    with launching(x_BTGHD) as (kernels, stream):
        kernels.recurrence_forward(
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
            (r_digits, tf32_allowed(), stream),
            *_teams(deal, mail, far),
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
    B, T, G, H, D = raw_BTGHD.shape
    dtype = raw_BTGHD.dtype
    last = last_shape(raw_BTGHD.shape, cu_seqlens, cell)
    want_r, want_b, want_state = want
    dx_BTGHD = like_x.new_empty(raw_BTGHD.shape)
    dr_GHDE = raw_BTGHD.new_empty(r_GHDE.shape if want_r else (0,))
    dstate_SBHD = raw_BTGHD.new_empty(last if want_state else (0,))
    if last[1] == 0:
        db_GHD = raw_BTGHD.new_zeros(r_GHDE.shape[:3] if want_b else (0,))
        return dx_BTGHD, dr_GHDE.zero_(), db_GHD, dstate_SBHD
    r_digits, r_GHDE = _digits(r_GHDE), plain(r_GHDE, dtype)
    dlast_SBHD = plain(dlast_SBHD, dtype)
    dh_BTHD, starts = dense_rows(dh_BTHD), starts_of(cu_seqlens, T, cell)
    deal = launch_shape(BACKWARD, D, _operand(r_digits), last[1], H, _chip(raw_BTGHD.device))
    mail, far = _exchange(deal, raw_BTGHD)
    states = raw_BTGHD.new_empty((deal.blocks, CHECKPOINT_INTERVAL, last[0] - 1, deal.places))
    h_prev_BTHD = like_x.new_empty((B, T, H, D) if want_r else (0,))
    db_parts = raw_BTGHD.new_empty((-(-last[1] // COLUMNS), G, H, D) if want_b else (0,))
    with launching(raw_BTGHD) as (kernels, stream):
        kernels.recurrence_backward(
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
            *(0, 0),
            address(dstate_SBHD) if want_state else 0,
            (
                *(r_digits, tf32_allowed(), stream),
                address(states),
                address(h_prev_BTHD) if want_r else 0,
                address(db_parts) if want_b else 0,
            ),
            *_teams(deal, mail, far),
        )
    if want_r:
        multiply_outer(dx_BTGHD, h_prev_BTHD, dr_GHDE)
    return dx_BTGHD, dr_GHDE, db_parts.sum(0) if want_b else db_parts, dstate_SBHD


def _chip(device: torch.device) -> Chip:
    if device.type == "cpu":
        return EMULATED
    has = torch.cuda.get_device_properties(device)
    return Chip(
        f"{has.major}.{has.minor}",
        has.multi_processor_count,
        has.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def _exchange(deal: Launch, like: Tensor) -> tuple[Tensor, Tensor]:
    """The flags of a launch's teams with what goes through their exchange, zero both; and room for
    what of R is in global memory."""
    meets = deal.is_team and not deal.is_cluster
    words = _flag_words(deal) + deal.teams * 2 * deal.slot_words if meets else 0
    mail = like.new_zeros(words, dtype=torch.int32)
    far = like.new_empty(deal.blocks * deal.far * deal.threads * 4, dtype=torch.int32)
    return mail, far


def _teams(deal: Launch, mail: Tensor, far: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The members of RecurrenceTeams; its units are 0 where a block has all of a head."""
    first = address(mail)
    units = deal.units if deal.is_team else 0
    addresses = (first, first + 4 * _flag_words(deal), address(far))
    return (units, deal.teams, deal.tiles, deal.near, int(deal.is_cluster)), addresses


def _flag_words(deal: Launch) -> int:
    return -(-deal.blocks // 4) * 4  # what follows them is read 16 bytes at a time


def _operand(r_digits: int) -> torch.dtype:
    """What the operands of a matrix product are kept in."""
    digits = CPU_DTYPES[r_digits]
    return digits if digits is torch.bfloat16 else torch.float32


def _digits(r_GHDE: Tensor) -> int:
    """The dtype code that says how many digits r has; float64 r is rounded to float32."""
    return dtype_code(r_GHDE if r_GHDE.dtype is not torch.float64 else r_GHDE.float())
