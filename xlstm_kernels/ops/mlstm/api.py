"""`xk.mlstm`: checks, autograd, and the choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...arguments import check_is_tensor, check_process_group, check_tensor, count_sequences
from ...backends import Backend
from ...cells import MLSTMState
from . import context_parallel, op, reference
from .arguments import check_state, make_options
from .combine import mlstm_combine
from .shapes import state_shapes

__all__ = ["mlstm", "mlstm_combine", "mlstm_context_parallel"]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    input_gate: str = "exp",
    normalizer: str = "max",
    scale: float | None = None,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """mLSTM: matrix memory with a scalar input and forget gate per head, over a whole sequence.

    Args:
        q, k: (B, T, H, K) queries and keys. float64, float32, bfloat16 or float16; any strides, so
            a `.transpose(1, 2)` of a head-first tensor costs no copy.
        v: (B, T, H, V) values, of q's dtype.
        i, f: (B, T, H) pre-activations of the input and the forget gate, any float dtype.
        state: (c (B, H, K, V), n (B, H, K), m (B, H)); None is zeros. Pass the returned state to
            go on.
        input_gate: "exp", or "sigmoid": no stabiliser is needed then and m is 0.
        normalizer: what the sums over the past are divided by, q n being their weights' sum:
            "max": max(|q n|, 1) in the unstabilised form; "plain": q n, for positive q and k;
            "none": nothing.
        scale: of q; None is K ** -0.5.
        eps: added to the divisor, after stabilisation.
        chunk_size: tokens that are processed side by side; None is the backend's choice, which for
            "reference" is the recurrence, token by token. It changes speed and rounding, nothing
            else, and a backend may use the nearest it has.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences; B is then 1 and states have
            S rows.
        backend: "auto", or one of "reference", "cpu", "triton"; a named backend runs or raises.

    Returns:
        h (B, T, H, V) in q's dtype, and the last state: float32, float64 for float64 q. Gates,
        states and sums are in that dtype too. Gradients are exact for q, k, v, i, f and the
        initial state, through h and through each part of the returned state.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Source: xLSTM, arXiv 2405.04517, section 2.3; chunkwise form and the sigmoid input gate:
    Tiled Flash Linear Attention, arXiv 2503.14376.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> i, f = torch.randn(2, 100, 4), torch.randn(2, 100, 4) + 3
        >>> h, state = xk.mlstm(q, k, v, i, f)
        >>> h.shape, state.c.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]))
    """
    _check("mlstm", q, k, v, i, f, state, cu_seqlens)
    options = make_options("mlstm", q.shape[-1], input_gate, normalizer, scale, eps, chunk_size)
    chosen = op.MLSTM.resolve(backend, q)
    state = None if state is None else MLSTMState(*state)
    if chosen is Backend.REFERENCE:
        form = None if chunk_size is None else partial(reference.chunkwise, chunk_size=chunk_size)
        return reference.forward(q, k, v, i, f, state, cu_seqlens, options, form)
    inputs = (q, k, v, i, f, *(state or (None, None, None)))
    call = (cu_seqlens, *options, chunk_size or 0)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        h, *last, _ = MLSTM.apply(chosen.value, call, *inputs)
    else:
        h, *last = op.forward(*inputs, *call, False, chosen.value)
    return h, MLSTMState(*last)


def mlstm_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    input_gate: str = "exp",
    normalizer: str = "max",
    scale: float | None = None,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """`xk.mlstm` of sequences that are split over the ranks of `torch.distributed`.

    Every rank of the group calls it with its own tokens, the first rank with the first ones; the
    results are those of one pass over all of them.

    Args:
        q, k, v, i, f: this rank's tokens, as in `xk.mlstm`. T may be another one on each rank, and
            0; B, H, K, V and dtype are the same on all.
        state: before the first rank's tokens. Only that rank reads it, and gets its gradient.
        group: the process group, in the order of the tokens; None is the default group.
        input_gate, normalizer, scale, eps, chunk_size, backend: as in `xk.mlstm`.

    Returns:
        h (B, T, H, V) of this rank's tokens, and on every rank the state after the last rank's.
        Gradients are exact: those of the sum of all ranks' losses, to all ranks' inputs.

        Under `no_grad` nothing is kept for a backward. Otherwise h and the state require a gradient
        on every rank, whatever its own inputs do, and the ranks go backward together: each through
        its h or the state. A rank that leaves it out lets the others wait.

    Raises:
        RuntimeError: `torch.distributed` is not initialised, or this rank is not of the group.
        ValueError, TypeError, NotImplementedError: as in `xk.mlstm`.

    Costs beside the pass itself: a product of k and v, and two more in the backward, which is about
    half the pass again on a CPU; and the group's states once on each rank, gathered forward and
    reduce-scattered backward: ranks x B H (K V + K + 2) numbers, for any T.

    Example:
        h, state = xk.mlstm_context_parallel(q, k, v, i, f, group=group)
        (h * weight).sum().backward()
    """
    function = "mlstm_context_parallel"
    _check(function, q, k, v, i, f, state, None)
    make_options(function, q.shape[-1], input_gate, normalizer, scale, eps, chunk_size)
    check_process_group(function, "group", group)
    initial = None if state is None else MLSTMState(*state)
    tokens, before, last = context_parallel.exchange((q, k, v, i, f), initial, input_gate, group)
    h, _ = mlstm(
        *(*tokens, before),
        input_gate=input_gate,
        normalizer=normalizer,
        scale=scale,
        eps=eps,
        chunk_size=chunk_size,
        backend=backend,
    )
    return h, last


class MLSTM(torch.autograd.Function):
    """Also returns an empty tensor. As a saved output it ties `MLSTMGrad` to every input: the state
    is not kept."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, call: tuple[Any, ...], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        h, c, n, m, *saved = op.forward(*inputs, *call, True, backend)
        cu_seqlens, *ctx.options = call
        ctx.backend = backend
        tie = h.new_empty(0)
        ctx.save_for_backward(tie, *inputs[:5], cu_seqlens, *saved)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        return h, c, n, m, tie

    @staticmethod
    def backward(ctx: Any, *doutputs: Tensor | None) -> tuple[Tensor | None, ...]:
        doutputs = doutputs[:4]
        if all(d is None for d in doutputs):
            return (None,) * 10
        want = ctx.needs_input_grad[2:]
        grads = MLSTMGrad.apply(
            ctx.backend, ctx.options, any(want[5:]), *doutputs, *ctx.saved_tensors
        )
        return (
            None,
            None,
            *(
                grad.to(dtype) if wanted else None
                for grad, dtype, wanted in zip(grads, ctx.dtypes, want, strict=True)
            ),
        )


class MLSTMGrad(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it is an error, not a zero."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, options: list[Any], want_state: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.backend = backend
        doutputs, inputs = tensors[:4], tensors[5:10]
        cu_seqlens, saved = tensors[10], list(tensors[11:])
        return tuple(
            op.backward(*(*doutputs, *inputs, saved, cu_seqlens, *options, want_state, backend))
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"mlstm: backend {ctx.backend!r} has no second derivative; use backend='reference'"
        )


def _check(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: tuple[Tensor, ...] | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; nothing here reads a tensor's values."""
    check_is_tensor(function, "q", q)
    check_is_tensor(function, "v", v)
    if q.dim() != 4 or 0 in q.shape[2:]:
        raise ValueError(
            f"{function}: q must be (B, T, H, K), none of H and K 0, got {tuple(q.shape)}"
        )
    B, T, H, _ = q.shape
    V = v.shape[-1] if v.dim() else 0
    if V == 0:
        raise ValueError(f"{function}: v must be (B, T, H, V), V not 0, got {tuple(v.shape)}")
    first = "q", q
    for name, x, letters, shape in (
        ("q", q, "", q.shape),
        ("k", k, "(B, T, H, K)", q.shape),
        ("v", v, "(B, T, H, V)", (B, T, H, V)),
        ("i", i, "(B, T, H)", (B, T, H)),
        ("f", f, "(B, T, H)", (B, T, H)),
    ):
        check_tensor(function, name, x, letters, tuple(shape), first)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{function}: {name} must have q's dtype {q.dtype}, got {x.dtype}")
    rows = count_sequences(function, first, cu_seqlens)
    if state is not None:
        check_state(function, state, state_shapes(rows, q, v), first)
