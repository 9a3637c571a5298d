"""A few steps of the mLSTM: the equations in cells/mlstm.py, c read once and written once.

A program holds columns of one head's c in registers, all of K, while the tokens go by:
    c' = f' c + i' k v^T     n' = f' n + i' k     h = (scale q c') row_scale(scale q n', m')
Source: xLSTM, arXiv 2405.04517, section 2.3; the sigmoid input gate: arXiv 2503.14376.
Tensors: shapes.py. Grid: heads of all sequences, blocks of columns. Sums are float32, in one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_math import log_sigmoid
from ..mlstm.triton_tiles import finite_base, row_scale

# Strides that vary with T and make no load wider: of the gates, of `read` and of `kept`. They stand
# in no tuple, within which Triton specialises on every integer.
VARYING = ("stride_ib", "stride_it", "stride_ih", "stride_fb", "stride_ft", "stride_fh")
VARYING += ("stride_rb", "stride_kb", "stride_kt")


class Rows(NamedTuple):
    """A (B, T, H, D) tensor with neighbours in D side by side, or a (B, T, H) one; its strides."""

    ptr: Any
    b: Any
    t: Any
    h: Any


class Tokens(NamedTuple):
    """q, k, v, and h, which is written: each `Rows`."""

    q: Any
    k: Any
    v: Any
    h: Any


class States(NamedTuple):
    """c (P, H, K, V), n (P, H, K) and m (P, H), and the strides of P; each row is contiguous."""

    c: Any
    n: Any
    m: Any
    c_row: Any
    n_row: Any
    m_row: Any


@triton.jit
def step_gates(i, f, m, INPUT_GATE: tl.constexpr):
    """m', f' and i' of one token."""
    kept = log_sigmoid(f) + m
    if INPUT_GATE == "sigmoid":
        i = log_sigmoid(i)
        m = finite_base(m) * 0.0
    else:
        m = tl.where(i > kept, i, kept)
    base = finite_base(m)
    return m, tl.exp(kept - base), tl.exp(i - base)


@triton.jit
def at(x, b, t, head):
    return x.ptr + b * x.b + tl.cast(t, tl.int64) * x.t + head * x.h


@triton.jit
def load_row(x, b, t, head, d, mask):
    return tl.load(at(x, b, t, head) + d, mask, other=0.0).to(tl.float32)


@triton.jit
def memory_at(states, row, head, k, v, K: tl.constexpr, V: tl.constexpr):
    return states.c + row * states.c_row + head * K * V + k[:, None] * V + v[None, :]


@triton.jit
def load_state(states, row, head, k, v, K: tl.constexpr, V: tl.constexpr, MEMORY: tl.constexpr):
    """c, n and m of a row, zeros where there is none; c only with MEMORY."""
    here = row >= 0
    mask = here & (k < K)
    c = tl.zeros((k.shape[0], v.shape[0]), tl.float32)
    if MEMORY:
        places = memory_at(states, row, head, k, v, K, V)
        c = tl.load(places, mask[:, None] & (v < V)[None, :], other=0.0).to(tl.float32)
    n = tl.load(states.n + row * states.n_row + head * K + k, mask, other=0.0)
    return c, n, tl.load(states.m + row * states.m_row + head, here, other=0.0)


@triton.jit
def store_state(
    states,
    row,
    head,
    k,
    v,
    c,
    n,
    m,
    K: tl.constexpr,
    V: tl.constexpr,
    MEMORY: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """In a row that is not negative: c with MEMORY, n and m with VECTORS."""
    mask = (k < K) & (row >= 0)
    if MEMORY:
        places = memory_at(states, row, head, k, v, K, V)
        c = c.to(states.c.dtype.element_ty)
        tl.store(places, c, mask[:, None] & (v < V)[None, :])
    if VECTORS and tl.program_id(1) == 0:
        tl.store(states.n + row * states.n_row + head * K + k, n, mask)
        tl.store(states.m + row * states.m_row + head, m, row >= 0)


@triton.jit(do_not_specialize=[*VARYING, "T", "scale", "eps"])
def step_kernel(
    tokens,
    i,
    stride_ib,
    stride_it,
    stride_ih,
    f,
    stride_fb,
    stride_ft,
    stride_fh,
    before,
    after,
    read,
    stride_rb,
    kept,
    stride_kb,
    stride_kt,
    T,
    H,
    scale,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUT_GATE: tl.constexpr,
    NORMALIZER: tl.constexpr,
    POOLED: tl.constexpr,
    INPLACE: tl.constexpr,
    KEPT: tl.constexpr,  # which states: "last", "all", or those with a row in `kept`
    MEMORY: tl.constexpr,  # writes h and c
    VECTORS: tl.constexpr,  # writes n and m, from the program of the first columns
):
    """read (B,) and kept (B, T): numbers of rows, negative for none."""
    q, k, v, h = tokens
    i = Rows(i, stride_ib, stride_it, stride_ih)
    f = Rows(f, stride_fb, stride_ft, stride_fh)
    b = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    row = b
    if POOLED:
        row = tl.load(read + b * stride_rb).to(tl.int64)
    here = row >= 0
    d_k = tl.arange(0, BLOCK_K)
    d_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = here & (d_k < K), here & (d_v < V)
    c_KV, n_K, m = load_state(before, row, head, d_k, d_v, K, V, MEMORY)
    for t in range(T):
        i_t, f_t = load_row(i, b, t, head, 0, here), load_row(f, b, t, head, 0, here)
        m, keep, take = step_gates(i_t, f_t, m, INPUT_GATE)
        k_K = take * load_row(k, b, t, head, d_k, mask_k)
        n_K = keep * n_K + k_K
        if MEMORY:
            q_K = scale * load_row(q, b, t, head, d_k, mask_k)
            c_KV = keep * c_KV + k_K[:, None] * load_row(v, b, t, head, d_v, mask_v)[None, :]
            by, _, _ = row_scale(tl.sum(q_K * n_K, 0), m, eps, NORMALIZER)
            h_V = tl.where(here, by * tl.sum(q_K[:, None] * c_KV, 0), 0.0)
            tl.store(at(h, b, t, head) + d_v, h_V.to(h.ptr.dtype.element_ty), d_v < V)
        if KEPT != "last":
            to = b * T + t
            if KEPT == "index":
                to = tl.load(kept + b * stride_kb + t * stride_kt).to(tl.int64)
                to = tl.where(here, to, -1)
            store_state(after, to, head, d_k, d_v, c_KV, n_K, m, K, V, MEMORY, VECTORS)
    if KEPT == "last":
        to = row if INPLACE else b
        store_state(after, to, head, d_k, d_v, c_KV, n_K, m, K, V, MEMORY, VECTORS)
