"""The recurrence in Triton on CUDA and HIP tensors: check, allocate, launch, return.

A program runs one head, and none waits for another. Gates, sums and states are float32, and so is
the accuracy of R h, but for bfloat16 r: there h and the gates' gradients keep 16 bits as operands.
dR is a product of what x's dtype leaves of them. One step, as a decoder's, has a kernel of its own,
whose programs have some units each of a head of any width, and float32's accuracy with any r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import TRITON_INTERPRETED, triton_refuses
from ...cells import CELLS
from ...memory import dense_rows, on_device, plain, triton_target
from .arguments import starts_of
from .products import multiply_outer
from .results import empty_like, forward_results
from .shapes import CHECKPOINT_INTERVAL, last_shape
from .triton_launch import WIDEST, Launch, choose, choose_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x_BTGHD: Tensor, r_GHDE: Tensor, cell: str, save: bool = True) -> str | None:
    if x_BTGHD.dtype not in DTYPES:
        return f"x must be float32, bfloat16 or float16, got {x_BTGHD.dtype}"
    if x_BTGHD.shape[-1] > WIDEST and (save or x_BTGHD.shape[1] != 1):
        but = "but for a step without a gradient"
        return f"a program runs a whole head: D at most {WIDEST} {but}"
    return triton_refuses("x", x_BTGHD.device)


def chip_of(tensor: Tensor) -> str:
    """As `choose` takes it."""
    if TRITON_INTERPRETED:
        return "interpreter"
    target = triton_target(tensor)
    return f"sm_{target.arch}" if target.backend == "cuda" else "hip"


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
    from .triton_forward import forward_kernel
    from .triton_step import step_kernel

    _, T, _, H, D = x_BTGHD.shape
    empty = empty_like(x_BTGHD)
    h_BTHD, last_SBHD, saved = forward_results(x_BTGHD, cu_seqlens, cell, save, empty)
    kernel: Any = step_kernel
    flags: dict[str, Any] = {}
    chip = chip_of(x_BTGHD)
    if T == 1:
        chosen = choose_step(D, r_GHDE.dtype, chip)
    else:
        chosen = choose(D, r_GHDE.dtype, chip, False)
        kernel, flags = forward_kernel, {"HELD": chosen.held}
    call = _Call(x_BTGHD, r_GHDE, last_SBHD.shape[1], T, H, cu_seqlens, cell, chosen)
    x_BTGHD = dense_rows(x_BTGHD)
    raw, checkpoints = saved or (x_BTGHD, last_SBHD)
    initial = _or(plain(state_SBHD, torch.float32), last_SBHD)
    call.launch(
        kernel,
        _rows(x_BTGHD),
        call.r,
        _or(plain(b_GHD, torch.float32), last_SBHD),
        call.starts,
        _states(initial),
        _rows(h_BTHD),
        _states(last_SBHD),
        _rows(raw),
        _states(checkpoints.transpose(0, 1)),
        *call.sizes,
        n_floor,
        STEP=call.step,
        HAS_BIAS=b_GHD is not None,
        HAS_INITIAL=state_SBHD is not None,
        SAVE=save,
        **flags,
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
    from .triton_backward import Grads, Saved, backward_kernel

    B, T, G, H, D = raw_BTGHD.shape
    last = last_shape(raw_BTGHD.shape, cu_seqlens, cell)
    want_r, want_b, want_state = want
    launch = choose(D, r_GHDE.dtype, chip_of(raw_BTGHD), True)
    call = _Call(raw_BTGHD, r_GHDE, last[1], T, H, cu_seqlens, cell, launch)
    dx_BTGHD = like_x.new_empty(raw_BTGHD.shape)
    dr_GHDE = raw_BTGHD.new_empty(r_GHDE.shape if want_r else (0,))
    dstate_SBHD = raw_BTGHD.new_empty(last if want_state else (0,))
    h_prev_BTHD = like_x.new_empty((B, T, H, D) if want_r else (0,) * 4)
    db_parts = raw_BTGHD.new_empty((call.tiles, G, H, D) if want_b else (0,))
    programs = call.tiles * H
    scratch = raw_BTGHD.new_empty(
        (programs, CHECKPOINT_INTERVAL, last[0] - 1, launch.rows, launch.width)
    )
    dh_BTHD = dense_rows(dh_BTHD)
    unused = checkpoints_NSHD
    call.launch(
        backward_kernel,
        _rows(_or(dh_BTHD, raw_BTGHD)),
        _states(_or(plain(dlast_SBHD, torch.float32), unused)),
        call.r,
        Saved(_rows(raw_BTGHD), _states(checkpoints_NSHD.transpose(0, 1))),
        call.starts,
        Grads(
            _rows(dx_BTGHD),
            _rows(h_prev_BTHD),
            db_parts,
            _states(dstate_SBHD if want_state else unused),
        ),
        scratch,
        *call.sizes,
        n_floor,
        float("inf") if clip_grad is None else clip_grad,
        STEP=call.step,
        STEP_GRAD=call.step_grad,
        HELD=launch.held,
        HAS_DH=dh_BTHD is not None,
        HAS_DLAST=dlast_SBHD is not None,
        WANT_R=want_r,
        WANT_B=want_b,
        WANT_STATE=want_state,
    )
    if want_r:
        multiply_outer(dx_BTGHD, h_prev_BTHD, dr_GHDE)
    return dx_BTGHD, dr_GHDE, db_parts.sum(0) if want_b else db_parts, dstate_SBHD


class _Call:
    """What both launches are told of the call; B counts sequences."""

    def __init__(
        self,
        like_x: Tensor,
        r_GHDE: Tensor,
        B: int,
        T: int,
        H: int,
        cu_seqlens: Tensor | None,
        cell: str,
        chosen: Launch,
    ):
        from ...cells.triton_cells import STEPS
        from .triton_tiles import Sizes

        self.like, self.sizes = like_x, Sizes(B, T, H)
        self.r = r_GHDE if r_GHDE.dtype in DTYPES else r_GHDE.float()
        self.r = self.r.contiguous()
        self.chosen, self.tiles = chosen, -(-B // chosen.rows)
        self.starts = _or(starts_of(cu_seqlens, T, cell), like_x)
        self.step, self.step_grad = STEPS[cell]
        self.D = r_GHDE.shape[-1]
        self.flags = {"STATES": CELLS[cell].states, "PACKED": cu_seqlens is not None}

    def launch(self, kernel: Any, *args: Any, **flags: Any) -> None:
        """A program for each head and tile of sequences, and in a step for each tile of units."""
        programs, chosen = self.tiles * self.sizes.H, self.chosen
        if programs == 0:
            return
        if chosen.registers:
            flags["maxnreg"] = chosen.registers
        with on_device(self.like):
            kernel[(programs, -(-self.D // chosen.width))](
                *args,
                D=self.D,
                BLOCK_D=chosen.width,
                ROWS=chosen.rows,
                INTERVAL=CHECKPOINT_INTERVAL,
                DOT=chosen.dot,
                DEPTH=chosen.depth,
                AHEAD=chosen.ahead,
                EMULATED=TRITON_INTERPRETED,
                num_warps=chosen.warps,
                **self.flags,
                **flags,
            )


def _rows(x: Tensor) -> Any:
    """Of (B, T, G, H, D) or (B, T, H, D)."""
    from .triton_tiles import Rows

    strides = x.stride() if x.dim() == 5 else (*x.stride()[:2], 0, *x.stride()[2:])
    return Rows(x, *strides[:4])


def _states(states_SBHD: Tensor) -> Any:
    from .triton_tiles import States

    return States(states_SBHD, states_SBHD.stride(1), states_SBHD.stride(0))


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """An address for what the kernel does not read."""
    return unused if tensor is None else tensor
