"""`xk.slstm` and `xk.lstm`: checks, autograd, and the choice of backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...arguments import check_is_number, check_is_tensor, check_tensor, count_sequences
from ...backends import Backend
from ...cells import CELLS, GATES, LSTMState, SLSTMState, compute_dtype
from . import op, reference


def slstm(
    x: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    state: SLSTMState | tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    forget_gate: str = "sigmoid",
    n_floor: float = 0.0,
    clip_grad: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """sLSTM: scalar memory with exponential gating and recurrent weights, over a whole sequence.

    Args:
        x: (B, T, 4, H, D) gate pre-activations W x, gates in the order i f z o. float64, float32,
            bfloat16 or float16, any strides.
        r: (4, H, D, D) recurrent weights [gate, head, out, in], any float dtype.
        b: (4, H, D) bias, or None.
        state: (h, c, n, m), each (B, H, D); None is zeros. Pass the returned state to go on.
        forget_gate: "sigmoid" or "exp", the paper's two choices.
        n_floor: lower bound of the normaliser n; 1.0 is flashrnn's, 0.0 is xlstm's.
        clip_grad: bound on each element of the gradient that flows to h_{t-1} through r.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences; B is then 1 and states have
            S rows.
        backend: "auto", or one of "reference", "cpu", "cuda", "triton"; a named backend runs or
            raises.

    Returns:
        h (B, T, H, D) in x's dtype, and the last state: float32, float64 for float64 x. Gates,
        states and sums are in that dtype too. Gradients are exact for x, r, b and the initial
        state, and flow through the returned state.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Source: xLSTM, arXiv 2405.04517, section 2.2.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> x, r = torch.randn(2, 7, 4, 3, 8), torch.randn(4, 3, 8, 8) / 8**0.5
        >>> h, state = xk.slstm(x, r)
        >>> h.shape, state.c.shape
        (torch.Size([2, 7, 3, 8]), torch.Size([2, 3, 8]))
    """
    check_slstm_options("slstm", forget_gate, n_floor, clip_grad)
    cell = "slstm" if forget_gate == "sigmoid" else "slstm_exp"
    return _recurrence(
        "slstm", cell, x, r, b, state, float(n_floor), clip_grad, cu_seqlens, backend
    )


def check_slstm_options(
    name: str, forget_gate: str, n_floor: float, clip_grad: float | None
) -> None:
    """Raises ValueError or TypeError, in the name of the function or layer `name`, for an option
    that is off."""
    if forget_gate not in ("sigmoid", "exp"):
        raise ValueError(f"{name}: forget_gate must be 'sigmoid' or 'exp', got {forget_gate!r}")
    check_is_number(name, "n_floor", n_floor)
    if not 0 <= n_floor < math.inf:
        raise ValueError(f"{name}: n_floor must be a finite number >= 0, got {n_floor}")
    if clip_grad is not None:
        check_is_number(name, "clip_grad", clip_grad)
        if not clip_grad > 0:
            raise ValueError(f"{name}: clip_grad must be a number > 0, got {clip_grad}")


def lstm(
    x: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    state: LSTMState | tuple[Tensor, Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LSTMState]:
    """LSTM with a block-diagonal recurrent matrix, over a whole sequence.

    With H = 1 this is the recurrence of `torch.nn.LSTM`: x = F.linear(input, weight_ih_l0) viewed
    as (B, T, 4, 1, D), r = weight_hh_l0 viewed as (4, 1, D, D), b = bias_ih_l0 + bias_hh_l0.

    Args:
        x: (B, T, 4, H, D) gate pre-activations W x, gates in the order i f z o. float64, float32,
            bfloat16 or float16, any strides.
        r: (4, H, D, D) recurrent weights [gate, head, out, in], any float dtype.
        b: (4, H, D) bias, or None.
        state: (h, c), each (B, H, D); None is zeros.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences; B is then 1 and states have
            S rows.
        backend: "auto", or one of "reference", "cpu", "cuda", "triton"; a named backend runs or
            raises.

    Returns:
        h (B, T, H, D) in x's dtype, and the last state: float32, float64 for float64 x.

    Raises:
        ValueError, TypeError, NotImplementedError: as `slstm`.

    Source: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate).

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> h, (h_last, c_last) = xk.lstm(torch.randn(2, 7, 4, 1, 8), torch.randn(4, 1, 8, 8))
        >>> torch.equal(h[:, -1], h_last)
        True
    """
    return _recurrence("lstm", "lstm", x, r, b, state, 0.0, None, cu_seqlens, backend)


def _recurrence(
    name: str,
    cell: str,
    x_BTGHD: Tensor,
    r_GHDE: Tensor,
    b_GHD: Tensor | None,
    state: tuple[Tensor, ...] | None,
    n_floor: float,
    clip_grad: float | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Any]:
    _check(name, cell, x_BTGHD, r_GHDE, b_GHD, state, cu_seqlens)
    state_SBHD = None
    if state is not None:
        state_SBHD = torch.stack(tuple(state))
        dtype = compute_dtype(x_BTGHD.dtype)
        if state_SBHD.dtype is not dtype:
            state_SBHD = state_SBHD.to(dtype)
    save = torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in (x_BTGHD, r_GHDE, b_GHD, state_SBHD)]
    )
    chosen = op.RECURRENCE.resolve(backend, x_BTGHD, r_GHDE, cell, save, function=name)
    call = (x_BTGHD, r_GHDE, b_GHD, state_SBHD, cu_seqlens, cell, n_floor)
    if chosen is Backend.REFERENCE:
        h_BTHD, last_SBHD = reference.forward(*call, clip_grad)
    elif save:
        h_BTHD, last_SBHD, _ = Recurrence.apply(name, clip_grad, chosen.value, *call)
    else:
        h_BTHD, last_SBHD = op.forward(*call, False, chosen.value)
    return h_BTHD, CELLS[cell].State(*last_SBHD.unbind(0))


class Recurrence(torch.autograd.Function):
    """Also returns an empty tensor. As a saved output it ties `RecurrenceGrad` to every input, most
    of which are not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        clip_grad: float | None,
        backend: str,
        x: Tensor,
        r: Tensor,
        b: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        cell: str,
        n_floor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, last, raw, checkpoints = op.forward(
            *(x, r, b, state, cu_seqlens, cell, n_floor, True, backend)
        )
        like_x = x.new_empty(0)
        ctx.save_for_backward(r, raw, checkpoints, cu_seqlens, like_x)
        ctx.set_materialize_grads(False)
        ctx.call = name, cell, n_floor, clip_grad, backend
        ctx.dtypes = r.dtype, None if b is None else b.dtype
        return h, last, like_x

    @staticmethod
    def backward(
        ctx: Any, dh: Tensor | None, dlast: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if dh is None and dlast is None:
            return (None,) * 10
        r, raw, checkpoints, cu_seqlens, like_x = ctx.saved_tensors
        r_dtype, b_dtype = ctx.dtypes
        want = list(ctx.needs_input_grad[4:7])
        dx, dr, db, dstate = RecurrenceGrad.apply(
            *ctx.call, want, dh, dlast, r, raw, checkpoints, cu_seqlens, like_x
        )
        want_r, want_b, want_state = want
        return (
            *(None, None, None),
            dx if ctx.needs_input_grad[3] else None,
            dr.to(r_dtype) if want_r else None,
            db.to(b_dtype) if want_b else None,
            dstate if want_state else None,
            *(None, None, None),
        )


class RecurrenceGrad(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it is an error, not a zero."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        cell: str,
        n_floor: float,
        clip_grad: float | None,
        backend: str,
        want: list[bool],
        dh: Tensor | None,
        dlast: Tensor | None,
        r: Tensor,
        raw: Tensor,
        checkpoints: Tensor,
        cu_seqlens: Tensor | None,
        like_x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.name, ctx.backend = name, backend
        return op.backward(
            *(dh, dlast, r, raw, checkpoints, cu_seqlens, cell, n_floor),
            *(clip_grad, like_x, want, backend),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"{ctx.name}: backend {ctx.backend!r} has no second derivative; use backend='reference'"
        )


def _check(
    name: str,
    cell: str,
    x: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: tuple[Tensor, ...] | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; nothing here reads a tensor's values."""
    G = len(GATES)
    check_is_tensor(name, "x", x)
    if x.dim() != 5 or x.shape[2] != G:
        raise ValueError(f"{name}: x must be (B, T, 4, H, D), got {tuple(x.shape)}")
    _, _, _, H, D = x.shape
    if H == 0 or D == 0:
        raise ValueError(f"{name}: x must have H and D of at least 1, got {tuple(x.shape)}")
    first = "x", x
    B = count_sequences(name, first, cu_seqlens)
    check_tensor(name, "x", x, "", x.shape, first)
    check_tensor(name, "r", r, "(4, H, D, D)", (G, H, D, D), first)
    if b is not None:
        check_tensor(name, "b", b, "(4, H, D)", (G, H, D), first)
    if state is None:
        return
    fields = CELLS[cell].State._fields
    if not isinstance(state, (tuple, list, Tensor)):
        raise TypeError(f"{name}: state must be ({', '.join(fields)}), got {type(state).__name__}")
    if len(state) != len(fields):
        raise ValueError(f"{name}: state must be ({', '.join(fields)}), got {len(state)} tensors")
    for field, part in zip(fields, state, strict=True):
        check_tensor(name, f"state.{field}", part, "(B, H, D)", (B, H, D), first)
