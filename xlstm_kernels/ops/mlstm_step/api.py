"""`xk.mlstm_step`: checks, autograd, and the choice of backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from ...cells import MLSTMState
from ..mlstm.api import mlstm
from ..mlstm.arguments import make_options
from . import op, reference
from .arguments import Tokens, check_call
from .shapes import state_dtypes


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | tuple[Tensor, Tensor, Tensor],
    *,
    input_gate: str = "exp",
    normalizer: str = "max",
    scale: float | None = None,
    eps: float = 1e-6,
    inplace: bool = False,
    state_index: Tensor | None = None,
    save_index: Tensor | None = None,
    all_states: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """mLSTM: one token of each sequence, or up to 16, from the state that `xk.mlstm` or the last
    step returned. The state is read once and written once, however many tokens there are.

    Args:
        q, k: (B, H, K) query and key of one token, or (B, T, H, K) of T tokens, T from 1 to 16.
            float64, float32, bfloat16 or float16; any strides.
        v: (B, H, V) or (B, T, H, V) value, of q's dtype.
        i, f: (B, H) or (B, T, H) pre-activations of the input and the forget gate, any float dtype.
            A token with i = -inf and f = inf leaves the state as it was.
        state: (c (B, H, K, V), n (B, H, K), m (B, H)); P rows instead of B with `state_index`. A
            bfloat16 c stays bfloat16: it is rounded once per call, sums are float32 all the same.
            What that costs in error stands in the README beside this file.
        input_gate, normalizer, scale, eps: as in `xk.mlstm`.
        inplace: the next state takes the storage of `state`, whose tensors are returned.
        state_index: (B,) int32 or int64: the row of `state`, a pool, where each sequence's state
            stands. Negative is padding: no row is read or written, h is 0. In place, the rows must
            differ. On CPU they are checked; on a GPU that would wait for it, so a row out of range
            reads or writes foreign memory there.
        save_index: (B, T), as `state_index`, or (B,) with one token: in place, the state after each
            token goes to this row and not to that of `state_index`, which it may name; negative:
            that state is not kept. A row must not be named twice, nor be another sequence's.
        all_states: the state after each token is returned, (B, T, H, K, V) and so on; not in place.
        out: takes h: contiguous, of its shape and dtype. In place and with the last axis of q, k
            and v contiguous, the call then allocates no tensor.
        backend: "auto", or one of "reference", "cpu", "triton"; a named backend runs or raises.

    `state_index` and `inplace` ask for state tensors in the dtypes of the next state, each row
    contiguous; rows may lie apart. Neither they nor `out` go with a gradient.

    Returns:
        h (B, H, V) or (B, T, H, V) in q's dtype, and the next state: float32, float64 for float64
        q; c bfloat16 where it was. Gradients are those of `xk.mlstm` over these tokens.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Source: xLSTM, arXiv 2405.04517, section 2.3.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> i, f = torch.randn(2, 100, 4), torch.randn(2, 100, 4) + 3
        >>> h, state = xk.mlstm(q, k, v, i, f)
        >>> token = [x[:, -1] for x in (q, k, v, i, f)]
        >>> h, state = xk.mlstm_step(*token, state, inplace=True)
        >>> h.shape
        torch.Size([2, 4, 16])

        Four drafted tokens, of which the first three and the first one turn out right:

        >>> drafted = [x[:, :4] for x in (q, k, v, i, f)]
        >>> h, states = xk.mlstm_step(*drafted, state, all_states=True)
        >>> accepted = torch.tensor([3, 1])
        >>> state = xk.MLSTMState(*(part[torch.arange(2), accepted - 1] for part in states))

        The same within a pool, where rolling back moves nothing: the next call reads another row.

        >>> pool = xk.MLSTMState(*(x.new_zeros(10, *x.shape[1:]) for x in state))
        >>> rows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])  # of either sequence
        >>> now = rows[:, 0]
        >>> how = {"inplace": True, "state_index": now, "save_index": rows}
        >>> h, pool = xk.mlstm_step(*drafted, pool, **how)
        >>> now = rows[torch.arange(2), accepted - 1]
    """
    tokens = (q, k, v, i, f)
    check_call(tokens, state, inplace, state_index, save_index, all_states, out)
    options = make_options("mlstm_step", q.shape[-1], input_gate, normalizer, scale, eps)
    state = MLSTMState(*state)
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *state))
    if with_grad:
        _check_differentiable(inplace, state_index, out)
    chosen = op.MLSTM_STEP.resolve(backend, q)
    if inplace:
        h = v.new_empty(v.shape) if out is None else out
        if chosen is Backend.REFERENCE:
            h.copy_(reference.update(tokens, state, state_index, save_index, options))
        else:
            op.update(*tokens, *state, h, state_index, save_index, *options, chosen.value)
        return h, state
    if chosen is Backend.REFERENCE:
        h, after = reference.forward(tokens, state, state_index, all_states, options)
    elif with_grad:
        how: dict[str, Any] = {**options._asdict(), "backend": chosen.value}
        h, after = _by_sequences(tokens, state, all_states, how)
    else:
        h, *parts = op.forward(*tokens, *state, state_index, all_states, *options, chosen.value)
        after = MLSTMState(*parts)
    return h if out is None else out.copy_(h), after


def _by_sequences(
    tokens: Tokens, state: MLSTMState, all_states: bool, how: dict[str, Any]
) -> tuple[Tensor, MLSTMState]:
    """By `xk.mlstm`, which is differentiable: all tokens at once, or, for the state after each, one
    after the other."""
    dtypes = state_dtypes(tokens[0], state.c)
    one = tokens[0].dim() == 3
    sequence = [x.unsqueeze(1) for x in tokens] if one else list(tokens)
    h_T, after = [], []
    split = (x.split(1 if all_states else x.shape[1], dim=1) for x in sequence)
    parts: Iterator[Tokens] = zip(*split, strict=True)
    for part in parts:
        h, state = mlstm(*part, state=state, **how)
        h_T.append(h)
        after.append([x.to(dtype) for x, dtype in zip(state, dtypes, strict=True)])
    if one:
        return h_T[0].squeeze(1), MLSTMState(*after[0])
    if not all_states:
        return h_T[0], MLSTMState(*after[0])
    return torch.cat(h_T, dim=1), MLSTMState(*(torch.stack(x, 1) for x in zip(*after, strict=True)))


def _check_differentiable(inplace: bool, state_index: Tensor | None, out: Tensor | None) -> None:
    if inplace:
        raise ValueError(
            "mlstm_step: inplace must be False where a gradient is asked for, got True; the step"
            " overwrites the state that the gradient needs"
        )
    for name, value in (("state_index", state_index), ("out", out)):
        if value is not None:
            raise ValueError(
                f"mlstm_step: {name} must be None where a gradient is asked for, got a tensor"
            )
