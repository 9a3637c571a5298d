"""The mLSTM in plain torch, any float dtype: three forms of the same function.

recurrent   the definition: cells/mlstm.py, token by token; the oracle of everything else
chunkwise   parallel within chunks, recurrent between them (arXiv 2503.14376, section 3)
parallel    all pairs of tokens at once, O(T^2); from a zero state, and returns none
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...arguments import token_starts
from ...cells import compute_dtype, no_autocast, no_tokens
from ...cells.mlstm import MLSTMState, Options, finite_base, log_gates, normalize, step
from .shapes import state_shapes

# q, k, v, i, f
Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# (q, k, v, i, f, state, options) -> (h, state), tensors in one dtype, sequences not packed
Form = Callable[..., tuple[Tensor, MLSTMState]]


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    state: MLSTMState | None,
    cu_seqlens: Tensor | None,
    options: Options,
    form: Form | None = None,
) -> tuple[Tensor, MLSTMState]:
    """h (B, T, H, V) in q's dtype and the last state in the compute dtype, by `form`."""
    form = form or recurrent
    dtype = compute_dtype(q_BTHK.dtype)
    with no_autocast(q_BTHK.device):
        inputs: Tokens = _each(lambda x: x.to(dtype), q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
        starts = None
        if cu_seqlens is not None:
            starts = token_starts("mlstm", cu_seqlens, q_BTHK.shape[1])
        if state is None:
            rows = q_BTHK.shape[0] if starts is None else len(starts) - 1
            shapes = state_shapes(rows, q_BTHK, v_BTHV)
            state = MLSTMState(*(q_BTHK.new_zeros(shape, dtype=dtype) for shape in shapes))
        state = MLSTMState(*(part.to(dtype) for part in state))
        if starts is None:
            h_BTHV, last = form(*inputs, state, options)
        elif len(starts) == 1:
            h_BTHV, last = v_BTHV.to(dtype), state
        else:
            lengths = [end - begin for begin, end in pairwise(starts)]
            sequences: Iterator[Tokens] = zip(
                *_each(lambda x: x.split(lengths, dim=1), *inputs), strict=True
            )
            runs = [
                form(*sequence, _row(state, row), options) for row, sequence in enumerate(sequences)
            ]
            h, lasts = zip(*runs, strict=True)
            h_BTHV = torch.cat(h, dim=1)
            last = MLSTMState(*(torch.cat(parts) for parts in zip(*lasts, strict=True)))
        if q_BTHK.shape[1] == 0:
            h_BTHV = no_tokens(h_BTHV, *inputs, *state)
            last = MLSTMState(*(part.clone() for part in last))  # the caller's own
    return h_BTHV.to(q_BTHK.dtype), last


def _each(f: Callable[[Tensor], Any], *tensors: Tensor) -> Any:
    return tuple(map(f, tensors))


def _row(state: MLSTMState, row: int) -> MLSTMState:
    return MLSTMState(*(part[row : row + 1] for part in state))


def recurrent(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    state: MLSTMState,
    options: Options,
) -> tuple[Tensor, MLSTMState]:
    steps = _each(lambda x: x.unbind(1), q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
    h_T = []
    tokens: Iterator[Tokens] = zip(*steps, strict=True)
    for inputs in tokens:
        h, state = step(*inputs, state, options)
        h_T.append(h)
    return torch.stack(h_T, dim=1) if h_T else v_BTHV, state


def chunkwise(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    state: MLSTMState,
    options: Options,
    chunk_size: int = 64,
) -> tuple[Tensor, MLSTMState]:
    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.split(chunk_size, dim=1) if x.shape[1] else ()

    h_N = []
    chunks: Iterator[Tokens] = zip(*_each(split, q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH), strict=True)
    for chunk in chunks:
        h, state = _chunk(*chunk, state, options)
        h_N.append(h)
    return torch.cat(h_N, dim=1) if h_N else v_BTHV, state


def _chunk(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    state: MLSTMState,
    options: Options,
) -> tuple[Tensor, MLSTMState]:
    c_BHKV, n_BHK, m_BH = state
    q_BTHK = options.scale * q_BTHK
    exponent_BHTT, lf_BHT = _exponents(i_BTH, f_BTH, options)
    old_BHT = lf_BHT.cumsum(-1) + m_BH[..., None]
    m_BHT = torch.maximum(old_BHT, exponent_BHTT.amax(-1))
    if options.input_gate == "sigmoid":
        m_BHT = torch.zeros_like(m_BHT)
    base_BHT = finite_base(m_BHT)
    decay_BHTT = (exponent_BHTT - base_BHT[..., None]).exp()
    inter_BHT = (old_BHT - base_BHT).exp()
    scores_BHTT = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) * decay_BHTT
    inter_q_BHTK = inter_BHT[..., None] * q_BTHK.transpose(1, 2)
    num_BHTV = torch.einsum("bhts,bshv->bhtv", scores_BHTT, v_BTHV) + inter_q_BHTK @ c_BHKV
    den_BHT = scores_BHTT.sum(-1) + (inter_q_BHTK @ n_BHK[..., None])[..., 0]
    h_BHTV = normalize(num_BHTV, den_BHT, m_BHT, options)
    # What the last row keeps of each token and of the old state is what the next state is made of.
    out_k_BHTK = decay_BHTT[:, :, -1, :, None] * k_BTHK.transpose(1, 2)
    keep_BH1 = inter_BHT[..., -1:]
    c_BHKV = keep_BH1[..., None] * c_BHKV + torch.einsum("bhtk,bthv->bhkv", out_k_BHTK, v_BTHV)
    n_BHK = keep_BH1 * n_BHK + out_k_BHTK.sum(2)
    return h_BHTV.transpose(1, 2), MLSTMState(c_BHKV, n_BHK, m_BHT[..., -1])


def _exponents(i_BTH: Tensor, f_BTH: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Exponent of token s at token t >= s, li_s + lf_{s+1} + ... + lf_t, -inf elsewhere; and lf."""
    li_BTH, lf_BTH = log_gates(i_BTH, f_BTH, options.input_gate)
    li_BHT, lf_BHT = li_BTH.transpose(1, 2), lf_BTH.transpose(1, 2)
    T = lf_BHT.shape[-1]
    # Summed down each column: differences of long cumulative sums would cancel.
    later_BHTT = lf_BHT[..., None].expand(*lf_BHT.shape, T).tril(-1).cumsum(-2)
    future_TT = torch.ones(T, T, dtype=torch.bool, device=lf_BHT.device).triu(1)
    return (later_BHTT + li_BHT[..., None, :]).masked_fill(future_TT, -torch.inf), lf_BHT


def parallel(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    options: Options,
) -> Tensor:
    """h (B, T, H, V) from a zero state with m = 0."""
    exponent_BHTT, lf_BHT = _exponents(i_BTH, f_BTH, options)
    m_BHT = torch.maximum(lf_BHT.cumsum(-1), exponent_BHTT.amax(-1))
    if options.input_gate == "sigmoid":
        m_BHT = torch.zeros_like(m_BHT)
    scores_BHTT = options.scale * torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK)
    scores_BHTT = scores_BHTT * (exponent_BHTT - finite_base(m_BHT)[..., None]).exp()
    num_BHTV = torch.einsum("bhts,bshv->bhtv", scores_BHTT, v_BTHV)
    return normalize(num_BHTV, scores_BHTT.sum(-1), m_BHT, options).transpose(1, 2)
