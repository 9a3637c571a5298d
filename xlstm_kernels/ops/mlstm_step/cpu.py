"""A few steps of the mLSTM in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import load_cpu
from ...cells import compute_dtype
from ...cells.mlstm import INPUT_GATES, NORMALIZERS
from ...memory import (
    CPU_DTYPES,
    address,
    dense_rows,
    dtype_code,
    fresh_cpu,
    plain,
    refused_by_cpu,
)
from .arguments import kept_rows, read_rows
from .shapes import next_shapes, row_strides, state_dtypes, token_count, token_strides


def supports(q_BTHK: Tensor) -> str | None:
    return refused_by_cpu(q=q_BTHK)


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    c_PHKV: Tensor,
    n_PHK: Tensor,
    m_PH: Tensor,
    state_index: Tensor | None,
    all_states: bool,
    *options: Any,
) -> list[Tensor]:
    dtypes = state_dtypes(q_BTHK, c_PHKV)
    state = [c_PHKV, n_PHK, m_PH]
    read: list[int] = []
    kept: list[int] = []
    if state_index is None:
        state = [plain(part, dtype) for part, dtype in zip(state, dtypes, strict=True)]
    else:
        read = read_rows(state_index, c_PHKV.shape[0])
    if all_states:
        kept = list(range(q_BTHK.shape[0] * token_count(q_BTHK)))
    shapes = next_shapes(q_BTHK, v_BTHV, all_states)
    after = [fresh_cpu(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    h_BTHV = torch.empty(v_BTHV.shape, dtype=v_BTHV.dtype)
    tokens = (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
    _launch(tokens, options, state, h_BTHV, after, read, kept)
    return [h_BTHV, *after]


def update(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    c_PHKV: Tensor,
    n_PHK: Tensor,
    m_PH: Tensor,
    h_BTHV: Tensor,
    state_index: Tensor | None,
    save_index: Tensor | None,
    *options: Any,
) -> None:
    """The state is of the dtypes of the next one, each row contiguous, and so is h."""
    state = [c_PHKV, n_PHK, m_PH]
    read: list[int] = []
    kept: list[int] = []
    if state_index is not None:
        read, kept = kept_rows(state_index, save_index, token_count(q_BTHK), c_PHKV.shape[0])
    tokens = (q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH)
    _launch(tokens, options, state, h_BTHV, state, read, kept)
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version([h_BTHV, *state])


def _launch(
    tokens: tuple[Tensor, ...],
    options: tuple[Any, ...],
    before: list[Tensor],
    h_BTHV: Tensor,
    after: list[Tensor],
    read: list[int],
    kept: list[int],
) -> None:
    q, k, v, *gates = tokens
    dtype = compute_dtype(q.dtype)
    heads = [dense_rows(x) for x in (q, k, v)]
    gates = [gate if gate.dtype in CPU_DTYPES else gate.to(dtype) for gate in gates]
    input_gate, normalizer, scale, eps = options
    strides = row_strides(before)
    kinds = (INPUT_GATES.index(input_gate), NORMALIZERS.index(normalizer))
    load_cpu().mlstm_step(
        (dtype_code(q), *kinds, *(dtype_code(x) for x in (*gates, before[0]))),
        (q.shape[0], token_count(q), *q.shape[-2:], v.shape[-1]),
        (scale, eps),
        [address(x) for x in (*heads, *gates)],
        [token_strides(x, q.dim()) for x in (*heads, *gates)],
        read,
        kept,
        [address(part) for part in before],
        strides,
        [address(x) for x in (h_BTHV, *after)],
        strides if after is before else row_strides(after),
    )
