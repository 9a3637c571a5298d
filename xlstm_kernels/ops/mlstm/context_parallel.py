"""What the ranks of `xk.mlstm_context_parallel` tell one another, and the states made of it.

A segment of tokens leaves log_decay, its forget gates' sum, of the log of what was before it, and
adds a state of its own. After N segments, tokens being segments of length one:

    exponent_j = log_decay_{j+1} + ... + log_decay_N + m_j     m = max_j exponent_j  ("sigmoid": 0)
    c = sum_j exp(exponent_j - m) c_j                          n likewise

Every rank sums up its own tokens, one gather brings each rank all of these, and each sums up those
before it. In the backward one reduce-scatter brings each rank its state's gradient.

Source: one gather of states whose size does not depend on T, LASP-2, arXiv 2502.07563, section 3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...cells import MLSTMState, compute_dtype, no_autocast
from ...cells.mlstm import finite_base, log_gates
from .shapes import state_shapes

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, i, f


class Segment(NamedTuple):
    """What some tokens do to a state; with a leading axis, what several such segments do."""

    log_decay: Tensor  # (B, H)
    state: MLSTMState


class Exchange(NamedTuple):
    """This rank's tokens, the state before them, and the state after the tokens of all ranks."""

    tokens: Tokens
    before: MLSTMState
    last: MLSTMState


def exchange(
    tokens: Tokens, initial: MLSTMState | None, input_gate: str, group: dist.ProcessGroup | None
) -> Exchange:
    """`initial` is the state before the first rank's tokens, and read on that rank alone."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    initial = initial if rank == 0 else None
    anchor, tokens, initial = _enter(tokens, initial)
    q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH = tokens
    dtype = compute_dtype(q_BTHK.dtype)
    shapes = state_shapes(q_BTHK.shape[0], q_BTHK, v_BTHV)
    if initial is None:
        initial = MLSTMState(*(q_BTHK.new_zeros(shape, dtype=dtype) for shape in shapes))
    initial = MLSTMState(*(part.to(dtype) for part in initial))
    with no_autocast(q_BTHK.device):
        own = _sum_tokens(k_BTHK, v_BTHV, i_BTH, f_BTH, input_gate, dtype)
        if rank == 0:
            nothing = torch.zeros_like(own.log_decay)
            both = Segment(nothing, initial), own
            own = Segment(own.log_decay, _sum_segments(_stack(both), input_gate))
        parts = [own.log_decay, *own.state]
        every = _Gather.apply(torch.cat([part.reshape(-1) for part in parts]), anchor, group)
        sizes = [part.numel() for part in parts]
        log_decay, c, n, m = (
            row.view(size, *part.shape)
            for row, part in zip(every.split(sizes, dim=1), parts, strict=True)
        )
        before = initial
        if rank > 0:
            some = Segment(log_decay[:rank], MLSTMState(c[:rank], n[:rank], m[:rank]))
            before = _sum_segments(some, input_gate)
        # The first rank needs nothing from the others, but they wait for it in the backward.
        before = before._replace(m=before.m + every[:0].sum())
        last = _sum_segments(Segment(log_decay, MLSTMState(c, n, m)), input_gate)
    return Exchange(tokens, before, last)


def _sum_tokens(
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    input_gate: str,
    dtype: torch.dtype,
) -> Segment:
    """The state after these tokens alone. Without any: c = n = 0 and m = -inf ("sigmoid": 0)."""
    li_TBH, lf_TBH = (
        gate.movedim(1, 0) for gate in log_gates(i_BTH.double(), f_BTH.double(), input_gate)
    )
    weight_TBH, m_BH = _weigh(lf_TBH, li_TBH, input_gate, dtype)
    c_BHKV, n_BHK = _WeightedSum.apply(weight_TBH.movedim(0, 1), k_BTHK, v_BTHV)
    return Segment(lf_TBH.sum(0).to(dtype), MLSTMState(c_BHKV, n_BHK, m_BH))


def _sum_segments(segments: Segment, input_gate: str) -> MLSTMState:
    c_NBHKV, n_NBHK, m_NBH = segments.state
    weight_NBH, m_BH = _weigh(segments.log_decay, m_NBH, input_gate, m_NBH.dtype)
    return MLSTMState(
        torch.einsum("nbh,nbhkv->bhkv", weight_NBH, c_NBHKV),
        torch.einsum("nbh,nbhk->bhk", weight_NBH, n_NBHK),
        m_BH,
    )


def _weigh(
    log_decay_NBH: Tensor, m_NBH: Tensor, input_gate: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """exp(exponent - m) and m, as on top; exponents in float64: their sums are long."""
    log_decay_NBH, m_NBH = log_decay_NBH.double(), m_NBH.double()
    later_NBH = torch.cat([log_decay_NBH[1:], torch.zeros_like(log_decay_NBH[:1])])
    exponent_NBH = later_NBH.flip(0).cumsum(0).flip(0) + m_NBH
    m_BH = exponent_NBH.new_full(exponent_NBH.shape[1:], -torch.inf)
    if input_gate == "sigmoid":
        m_BH = torch.zeros_like(m_BH)
    elif len(exponent_NBH):
        m_BH = exponent_NBH.max(0).values  # of equals the first, as in the recurrence
    # Relative to the m that is returned, so that its rounding does not count. Gradients through
    # `base` cancel against those through the exponents: float64 as well.
    rounded_BH = m_BH.to(dtype)
    base_BH = finite_base(m_BH)
    base_BH = base_BH + (base_BH.detach().to(dtype).double() - base_BH.detach())
    exponent_NBH = exponent_NBH - base_BH
    # Products with a smaller weight are subnormal, and ten times as slow.
    smallest = math.log(torch.finfo(dtype).tiny) + 8
    weight_NBH = exponent_NBH.masked_fill(exponent_NBH < smallest, -torch.inf).exp()
    return weight_NBH.to(dtype), rounded_BH


def _stack(segments: tuple[Segment, ...]) -> Segment:
    log_decays, states = zip(*segments, strict=True)
    parts = (torch.stack(part) for part in zip(*states, strict=True))
    return Segment(torch.stack(log_decays), MLSTMState(*parts))


def _enter(
    tokens: Tokens, initial: MLSTMState | None
) -> tuple[Tensor | None, Tokens, MLSTMState | None]:
    """Leads all that requires a gradient through one node, and an anchor that always does.

    Whatever a rank asks a gradient of, its backward then passes the gather, where others wait.
    """
    if not torch.is_grad_enabled():
        return None, tokens, initial
    every: list[Any] = [*tokens, *(initial or (None, None, None))]
    wanted = [n for n, x in enumerate(every) if x is not None and x.requires_grad]
    anchor, *entered = _Enter.apply(
        torch.empty(0, device=tokens[0].device, requires_grad=True), *(every[n] for n in wanted)
    )
    for n, x in zip(wanted, entered, strict=True):
        every[n] = x
    return anchor, tuple(every[:5]), MLSTMState(*every[5:]) if initial is not None else None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class _Gather(torch.autograd.Function):
    """(P,) of each rank to (ranks, P) on each. Lists suit every backend and release of torch."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, anchor: Tensor | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.group = group
        every = own.new_empty(dist.get_world_size(group), own.numel())
        dist.all_gather(list(every), own, group=group)
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, devery: Tensor) -> tuple[Tensor, None, None]:
        down = devery.new_empty(devery.shape[1])
        dist.reduce_scatter(down, list(devery.contiguous()), group=ctx.group)
        return down, None, None


class _WeightedSum(torch.autograd.Function):
    """c = sum_t w_t k_t v_t^T and n = sum_t w_t k_t in w's dtype. Autograd would save w k and v in
    that dtype; this saves its inputs."""

    @staticmethod
    def forward(ctx: Any, w_BTH: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(w_BTH, k_BTHK, v_BTHV)
        wk_BTHK = w_BTH[..., None] * k_BTHK
        c_BHKV = torch.einsum("bthk,bthv->bhkv", wk_BTHK, v_BTHV.to(w_BTH.dtype))
        return c_BHKV, wk_BTHK.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dc_BHKV: Tensor, dn_BHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w_BTH, k_BTHK, v_BTHV = ctx.saved_tensors
        dwk_BTHK = torch.einsum("bthv,bhkv->bthk", v_BTHV.to(w_BTH.dtype), dc_BHKV)
        dwk_BTHK += dn_BHK[:, None]
        wk_BTHK = w_BTH[..., None] * k_BTHK
        dv_BTHV = torch.einsum("bthk,bhkv->bthv", wk_BTHK, dc_BHKV)
        dw_BTH = torch.mul(k_BTHK, dwk_BTHK, out=wk_BTHK).sum(-1)
        dk_BTHK = dwk_BTHK.mul_(w_BTH[..., None])
        return dw_BTH, dk_BTHK.to(k_BTHK.dtype), dv_BTHV.to(v_BTHV.dtype)
