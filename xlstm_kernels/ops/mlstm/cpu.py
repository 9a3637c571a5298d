"""The mLSTM in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import token_starts
from ...backends import load_cpu
from ...cells import compute_dtype
from ...cells.mlstm import INPUT_GATES, NORMALIZERS
from ...memory import address, dense_rows, dtype_code, fresh_cpu, plain, refused_by_cpu
from .shapes import saved_shapes, sequences, state_shapes

# Tokens of a chunk: few enough that its scores are cheap beside the state's update, many enough
# that the state is read and written seldom.
CHUNK_SIZE = 64
# On AMX tiles the products are cheap beside what is done around them once a chunk.
TILE_CHUNK_SIZE = 128
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 256

NO_STATE = (0, 0, 0)


def supports(q_BTHK: Tensor) -> str | None:
    return refused_by_cpu(q=q_BTHK)


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    c_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    m_BH: Tensor | None,
    cu_seqlens: Tensor | None,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
    chunk_size: int,
    save: bool,
) -> list[Tensor]:
    dtype = compute_dtype(q_BTHK.dtype)
    state = [plain(part, dtype) for part in (c_BHKV, n_BHK, m_BH)]
    h_BTHV = fresh_cpu(v_BTHV.shape, v_BTHV.dtype)
    last = [
        torch.empty(shape, dtype=dtype)
        for shape in state_shapes(sequences(q_BTHK, cu_seqlens), q_BTHK, v_BTHV)
    ]
    saved = [fresh_cpu(s, dtype) for s in saved_shapes(q_BTHK, v_BTHV, cu_seqlens)] if save else []
    if save and cu_seqlens is not None:
        for part in saved[2:]:
            part.zero_()  # its last rows belong to no sequence
    call = _Call(
        *(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, cu_seqlens),
        *(input_gate, normalizer, scale, eps, chunk_size),
    )
    load_cpu().mlstm_forward(
        *call.arguments,
        [address(part) for part in saved] or [0] * 5,
        [address(part) for part in state],
        [address(part) for part in (h_BTHV, *last)],
    )
    return [h_BTHV, *last, *saved]


def backward(
    dh_BTHV: Tensor | None,
    dc_BHKV: Tensor | None,
    dn_BHK: Tensor | None,
    dm_BH: Tensor | None,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    saved: list[Tensor],
    cu_seqlens: Tensor | None,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
    chunk_size: int,
    want_state: bool,
) -> list[Tensor]:
    dtype = compute_dtype(q_BTHK.dtype)
    inputs = [
        *(fresh_cpu(x.shape, x.dtype) for x in (q_BTHK, k_BTHK, v_BTHV)),
        *(torch.empty(i_BTH.shape, dtype=dtype) for _ in range(2)),
    ]
    shapes = state_shapes(sequences(q_BTHK, cu_seqlens), q_BTHK, v_BTHV)
    dstate = [torch.empty(shape if want_state else (0,), dtype=dtype) for shape in shapes]
    dlast = [plain(part, dtype) for part in (dc_BHKV, dn_BHK, dm_BH)]
    dh_BTHV = dense_rows(dh_BTHV)
    call = _Call(
        *(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, cu_seqlens),
        *(input_gate, normalizer, scale, eps, chunk_size),
    )
    load_cpu().mlstm_backward(
        *call.arguments,
        [address(part) for part in saved],
        address(dh_BTHV),
        NO_STATE if dh_BTHV is None else dh_BTHV.stride()[:3],
        [address(part) for part in dlast],
        [address(part) for part in inputs],
        [address(part) for part in dstate] if want_state else NO_STATE,
    )
    return [*inputs, *dstate]


class _Call:
    """What both kernels are told of the call, and the tensors whose addresses that names."""

    def __init__(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        i_BTH: Tensor,
        f_BTH: Tensor,
        cu_seqlens: Tensor | None,
        input_gate: str,
        normalizer: str,
        scale: float,
        eps: float,
        chunk_size: int,
    ):
        _, T, H, K = q_BTHK.shape
        dtype = compute_dtype(q_BTHK.dtype)
        self.tensors = (
            *(dense_rows(x) for x in (q_BTHK, k_BTHK, v_BTHV)),
            *(gate.to(dtype) for gate in (i_BTH, f_BTH)),
        )
        self.starts = None
        if cu_seqlens is not None:
            token_starts("mlstm", cu_seqlens, T)
            self.starts = cu_seqlens.contiguous()
        on_tiles = q_BTHK.dtype == torch.bfloat16 and load_cpu().current_isa() == "amx"
        preferred = chunk_size or (TILE_CHUNK_SIZE if on_tiles else CHUNK_SIZE)
        chunk = min(max(preferred, SMALLEST_CHUNK), LARGEST_CHUNK)
        self.arguments = (
            (
                dtype_code(q_BTHK),
                INPUT_GATES.index(input_gate),
                NORMALIZERS.index(normalizer),
            ),
            (sequences(q_BTHK, cu_seqlens), T, H, K, v_BTHV.shape[3], min(chunk, max(T, 1))),
            (scale, eps),
            address(self.starts),
            [address(x) for x in self.tensors],
            [x.stride()[:3] for x in self.tensors],
        )
