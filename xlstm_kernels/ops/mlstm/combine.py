"""`xk.mlstm_combine`: states of two segments of a sequence made one.

m = max(log_decay_b + m_a, m_b)     c = exp(log_decay_b + m_a - m) c_a + exp(m_b - m) c_b
n likewise. Associative; a state of m = -inf, or c = n = 0, is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import check_is_tensor, check_tensor
from ...cells import MLSTMState
from ...cells.mlstm import finite_base

AXES = "(B, H, K, V)", "(B, H, K)", "(B, H)"


def mlstm_combine(
    state_a: MLSTMState | tuple[Tensor, Tensor, Tensor],
    log_decay_b: Tensor,
    state_b: MLSTMState | tuple[Tensor, Tensor, Tensor],
) -> MLSTMState:
    """The mLSTM's state after segment a followed by segment b, from each segment's own state.

    Args:
        state_a: (c (B, H, K, V), n (B, H, K), m (B, H)) after segment a.
        log_decay_b: (B, H) what segment b leaves of the past: log_sigmoid(f) summed over b; -inf
            forgets all of it.
        state_b: the state of segment b started from nothing, as `xk.mlstm` with state=None returns.

    Returns:
        The state after both. Its memory c exp(m) and n exp(m) is that of one pass over a and b; m,
        which is a scale, may differ. Differentiable any number of times. m = -inf is a state that
        holds nothing.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: the recurrence between chunks of Tiled Flash Linear Attention, arXiv 2503.14376, section
    3, as an associative operation.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> x = [torch.randn(2, 60, 4, 16) for _ in "qkv"] + [torch.randn(2, 60, 4) for _ in "if"]
        >>> a, b = ([t[:, s] for t in x] for s in (slice(0, 25), slice(25, 60)))
        >>> (_, state_a), (_, state_b) = xk.mlstm(*a), xk.mlstm(*b)
        >>> log_decay_b = torch.nn.functional.logsigmoid(b[-1]).sum(1)
        >>> c, n, m = xk.mlstm_combine(state_a, log_decay_b, state_b)
        >>> (_, whole) = xk.mlstm(*x)
        >>> scale, whole_scale = (s.exp()[..., None] for s in (m, whole.m))
        >>> torch.allclose(n * scale, whole.n * whole_scale, rtol=1e-3, atol=1e-4)
        True
    """
    _check(state_a, log_decay_b, state_b)
    c_a, n_a, m_a = state_a
    c_b, n_b, m_b = state_b
    m_a = log_decay_b + m_a
    m = torch.where(m_b > m_a, m_b, m_a)  # at a tie its gradient goes to a, as in the recurrence
    base = finite_base(m)
    keep_BH1, add_BH1 = (m_a - base).exp()[..., None], (m_b - base).exp()[..., None]
    c = keep_BH1[..., None] * c_a + add_BH1[..., None] * c_b
    return MLSTMState(c, keep_BH1 * n_a + add_BH1 * n_b, m)


def _check(state_a: tuple[Tensor, ...], log_decay_b: Tensor, state_b: tuple[Tensor, ...]) -> None:
    for name, state in (("state_a", state_a), ("state_b", state_b)):
        if not isinstance(state, (tuple, list)):
            raise TypeError(f"mlstm_combine: {name} must be (c, n, m), got {type(state).__name__}")
        if len(state) != 3:
            raise ValueError(f"mlstm_combine: {name} must be (c, n, m), got {len(state)} tensors")
    c = state_a[0]
    check_is_tensor("mlstm_combine", "state_a.c", c)
    if c.dim() != 4:
        raise ValueError(f"mlstm_combine: state_a.c must be {AXES[0]}, got {tuple(c.shape)}")
    first = "state_a.c", c
    for name, state in (("state_a", state_a), ("state_b", state_b)):
        for axis, (field, part) in enumerate(zip(MLSTMState._fields, state, strict=True)):
            shape = tuple(c.shape[: 4 - axis])
            check_tensor("mlstm_combine", f"{name}.{field}", part, AXES[axis], shape, first)
    check_tensor("mlstm_combine", "log_decay_b", log_decay_b, "(B, H)", tuple(c.shape[:2]), first)
