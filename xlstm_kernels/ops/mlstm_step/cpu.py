"""One step of the mLSTM in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_cpu
from ...cells import compute_dtype
from ...cells.mlstm import INPUT_GATES, NORMALIZERS
from ...memory import address, dense_rows, dtype_code, fresh_cpu, plain, refused_by_cpu


def supports(q_BHK: Tensor) -> str | None:
    return refused_by_cpu(q=q_BHK)


def forward(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    i_BH: Tensor,
    f_BH: Tensor,
    c_BHKV: Tensor,
    n_BHK: Tensor,
    m_BH: Tensor,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> list[Tensor]:
    dtype = compute_dtype(q_BHK.dtype)
    state = [plain(part, dtype) for part in (c_BHKV, n_BHK, m_BH)]
    after = [fresh_cpu(part.shape, dtype) for part in state]
    token = (q_BHK, k_BHK, v_BHV, i_BH, f_BH)
    return [_launch(token, state, after, input_gate, normalizer, scale, eps), *after]


def update(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    i_BH: Tensor,
    f_BH: Tensor,
    c_BHKV: Tensor,
    n_BHK: Tensor,
    m_BH: Tensor,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> Tensor:
    """The state is contiguous and of the compute dtype."""
    state = [c_BHKV, n_BHK, m_BH]
    token = (q_BHK, k_BHK, v_BHV, i_BH, f_BH)
    h_BHV = _launch(token, state, state, input_gate, normalizer, scale, eps)
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version(state)
    return h_BHV


def _launch(
    token: tuple[Tensor, ...],
    before: list[Tensor],
    after: list[Tensor],
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> Tensor:
    q_BHK, _, v_BHV, *gates = token
    h_BHV = torch.empty(v_BHV.shape, dtype=v_BHV.dtype)
    dtype = compute_dtype(q_BHK.dtype)
    inputs = [dense_rows(x) for x in token[:3]]
    inputs += [gate.to(dtype) for gate in gates]
    kinds = (
        dtype_code(q_BHK),
        INPUT_GATES.index(input_gate),
        NORMALIZERS.index(normalizer),
    )
    load_cpu().mlstm_step(
        kinds,
        (*q_BHK.shape, v_BHV.shape[2]),
        scale,
        eps,
        [address(x) for x in inputs],
        [x.stride()[:2] for x in inputs],
        [address(part) for part in before],
        [address(h_BHV), *(address(part) for part in after)],
    )
    return h_BHV
