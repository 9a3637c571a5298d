"""`xk.mlstm_step`: checks, autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import check_is_tensor, check_tensor
from ...backends import Backend
from ...cells import MLSTMState, compute_dtype
from ..mlstm.api import mlstm
from ..mlstm.arguments import check_state, make_options
from . import op, reference


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
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """mLSTM: one token of each sequence, from the state that `xk.mlstm` or the last step returned.

    Args:
        q, k: (B, H, K) query and key. float64, float32, bfloat16 or float16; any strides.
        v: (B, H, V) value, of q's dtype.
        i, f: (B, H) pre-activations of the input and the forget gate, any float dtype.
        state: (c (B, H, K, V), n (B, H, K), m (B, H)).
        input_gate, normalizer, scale, eps: as in `xk.mlstm`.
        inplace: the next state takes the storage of `state`, whose tensors are returned. They must
            be contiguous and float32, float64 for float64 q, and no gradient may be asked for.
        backend: "auto", or one of "reference", "cpu"; a named backend runs or raises.

    Returns:
        h (B, H, V) in q's dtype, and the next state: float32, float64 for float64 q. Gradients are
        those of `xk.mlstm` over this one token.

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
    """
    _check(q, k, v, i, f, state)
    options = make_options("mlstm_step", q.shape[-1], input_gate, normalizer, scale, eps)
    state = MLSTMState(*state)
    token = (q, k, v, i, f)
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*token, *state))
    if inplace:
        _check_writable(state, compute_dtype(q.dtype), with_grad)
    chosen = op.MLSTM_STEP.resolve(backend, q)
    if chosen is Backend.REFERENCE:
        h, after = reference.forward(*token, state, options)
        if not inplace:
            return h, after
        for part, new in zip(state, after, strict=True):
            part.copy_(new)
        return h, state
    if with_grad:
        sequence = {name: x.unsqueeze(1) for name, x in zip("qkvif", token, strict=True)}
        how: dict[str, Any] = {**sequence, **options._asdict()}
        h, after = mlstm(**how, state=state, backend=chosen.value)
        return h.squeeze(1), after
    if inplace:
        return op.update(*token, *state, *options, chosen.value), state
    h, *after = op.forward(*token, *state, *options, chosen.value)
    return h, MLSTMState(*after)


def _check(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: tuple[Tensor, ...]
) -> None:
    """Shapes, dtypes and devices; nothing here reads a tensor's values."""
    check_is_tensor("mlstm_step", "q", q)
    check_is_tensor("mlstm_step", "v", v)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(
            f"mlstm_step: q must be (B, H, K), none of H and K 0, got {tuple(q.shape)}"
        )
    B, H, K = q.shape
    V = v.shape[-1] if v.dim() else 0
    if V == 0:
        raise ValueError(f"mlstm_step: v must be (B, H, V), V not 0, got {tuple(v.shape)}")
    first = "q", q
    for name, x, letters, shape in (
        ("q", q, "", (B, H, K)),
        ("k", k, "(B, H, K)", (B, H, K)),
        ("v", v, "(B, H, V)", (B, H, V)),
        ("i", i, "(B, H)", (B, H)),
        ("f", f, "(B, H)", (B, H)),
    ):
        check_tensor("mlstm_step", name, x, letters, shape, first)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"mlstm_step: {name} must have q's dtype {q.dtype}, got {x.dtype}")
    check_state("mlstm_step", state, ((B, H, K, V), (B, H, K), (B, H)), first)


def _check_writable(state: MLSTMState, dtype: torch.dtype, with_grad: bool) -> None:
    if with_grad:
        raise ValueError(
            "mlstm_step: inplace must be False where a gradient is asked for, got True; the step"
            " overwrites the state that the gradient needs"
        )
    for field, part in zip(MLSTMState._fields, state, strict=True):
        if part.dtype != dtype:
            raise TypeError(
                f"mlstm_step: state.{field} must be {dtype} with inplace=True, got {part.dtype}"
            )
        if not part.is_contiguous():
            raise ValueError(
                f"mlstm_step: state.{field} must be contiguous with inplace=True,"
                f" got strides {part.stride()}"
            )
