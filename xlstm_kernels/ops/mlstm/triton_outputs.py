"""Outputs of the mLSTM from the states before every interval, in Triton.

  num_i = sum_j P_ij v_j + inter_i C^T q_i     den_i = sum_j P_ij + inter_i <n, q_i>
  P_ij = scale <q_i, k_j> D_ij                 inter_i = scale exp(query_log_i + decays before + m)
over the tokens j <= i of i's interval, whose state before it is (C, n, m); D: triton_tiles.py.
Source: Tiled Flash Linear Attention, arXiv 2503.14376, section 3, and README.md beside this file.
q, k (B, T, H, K), v, h (B, T, H, V); row_m, row_den (B, T, H) float32 are what backward needs.
Programs: a tile of tokens and a block of values of one head. Accumulators are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .triton_tiles import (
    GATE_STRIDES,
    GateRows,
    Sizes,
    finite_base,
    load_block,
    load_log_f,
    load_log_i,
    load_tile,
    locate,
    own_logs,
    product,
    row_scale,
    store_tile,
)


@triton.jit(do_not_specialize=[*GATE_STRIDES, "T", "BT", "slots", "scale", "eps"])
def outputs_kernel(
    q,
    k,
    v,
    h,
    i_ptr,
    f_ptr,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    states,
    key_log,
    decay,
    tile_m,
    row_m,
    row_den,
    scale,
    eps,
    packing,
    T,
    BT,
    slots,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    PER: tl.constexpr,
    INPUT_GATE: tl.constexpr,
    NORMALIZER: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE: tl.constexpr,
):
    gates = GateRows(i_ptr, f_ptr, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(2)
    here = locate(packing, sizes, TILE, PACKED)
    at, own, tokens, tiles, row = here.at, here.own, here.tokens, here.tiles, here.interval
    if own * TILE >= at.length:
        return
    t = own * TILE + tl.arange(0, TILE)
    kk, vv = tl.arange(0, BLOCK_K), block * BLOCK_V + tl.arange(0, BLOCK_V)
    q_tile = load_tile(q, at, head, own, kk, K, TILE)

    lf = load_log_f(gates, at, head, t, at.length)
    log = own_logs(lf, load_log_i(gates, at, head, t, at.length, INPUT_GATE), 0, TILE)
    since = tl.cumsum(lf, 0)
    m = finite_base(since) * 0.0
    if INPUT_GATE == "exp":
        m = tl.maximum(tl.load(tile_m + tiles + own) + since, tl.max(log, 1))
    base = finite_base(m)
    query_log = since - base

    # The state before the interval.
    p = own // PER * PER + tl.arange(0, PER)
    before = tl.sum(tl.load(decay + tiles + p, p < own, other=0.0), 0)
    inter = scale * tl.exp(query_log + before + tl.load(states.m + row * H + head))
    den = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, BLOCK_V), tl.float32)
    for first in tl.range(0, K, BLOCK_C):
        ks = first + tl.arange(0, BLOCK_C)
        q_block = load_tile(q, at, head, own, ks, K, TILE)
        c, n = load_block(states, row, head, H, ks, vv, K, V)
        sums += dot(q_block, c, DOT)
        den += tl.sum(q_block.to(tl.float32) * n[None, :], 1)
    sums *= inter[:, None]
    den *= inter

    # The own tile.
    k_tile = load_tile(k, at, head, own, kk, K, TILE)
    scores = product(q_tile, k_tile, q, k, at, head, own, own, K, BLOCK_K, TILE, DOT)
    scores *= scale * tl.exp(log - base[:, None])
    den += tl.sum(scores, 1)
    sums += dot(scores, load_tile(v, at, head, own, vv, V, TILE), DOT)

    # Earlier tiles of the interval, from the last to the first.
    for back in tl.range(1, own % PER + 1):
        s = t - back * TILE
        log_s = tl.load(key_log + tokens + s)
        largest = tl.max(log_s, 0)
        k_tile = load_tile(k, at, head, own - back, kk, K, TILE)
        scores = product(q_tile, k_tile, q, k, at, head, own, own - back, K, BLOCK_K, TILE, DOT)
        # Two factors, each at most 1, cost fewer exponentials than one of the sum.
        scores *= (scale * tl.exp(query_log + largest))[:, None]
        scores *= tl.exp(log_s - finite_base(largest))[None, :]
        den += tl.sum(scores, 1)
        sums += dot(scores, load_tile(v, at, head, own - back, vv, V, TILE), DOT)
        query_log += tl.load(decay + tiles + own - back)

    by, _, _ = row_scale(den, m, eps, NORMALIZER)
    store_tile(h, at, head, own, vv, sums * by[:, None], V, TILE)
    if SAVE and block == 0:
        rows = (at.token + t) * H + head
        tl.store(row_m + rows, m, t < at.length)
        tl.store(row_den + rows, den, t < at.length)
