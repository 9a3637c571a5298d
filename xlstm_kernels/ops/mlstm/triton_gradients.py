"""Gradients of the mLSTM's tokens, in Triton.

  dnum_i = dh_i / (N_i + eps)           dS_ij = (<dnum_i, v_j> + dden_i) D_ij
  dq_i = scale (sum_j dS_ij k_j + inter_i (C dnum_i + n dden_i))
  dk_j = scale sum_i dS_ij q_i + out_j (dC' v_j + dn')
  dv_j = sum_i P_ij dnum_i + out_j dC'^T k_j          W_ij = scale <q_i, k_j> dS_ij
over the pairs j <= i of an interval; (C, n) is the state before it, (dC', dn') the gradient of the
one after it. <dh, h>, which dden is made of, is known once all of a row's pairs are: until then dq
is two sums, one of them times dden. D, query_log, key_log: triton_tiles.py.
Source: README.md beside this file.
q, k (B, T, H, K), v, dh (B, T, H, V) and their gradients; notes (H, B T) and (H, tiles) float32.
Programs: a tile of tokens of one head, and a block of keys or values. Accumulators are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .triton_tiles import (
    GATE_STRIDES,
    INTERVAL,
    GateRows,
    Sizes,
    finite_base,
    load_block,
    load_key_log,
    load_log_f,
    load_log_i,
    load_tile,
    locate,
    own_logs,
    product,
    row_scale,
    store_sum,
    store_tile,
)


class TokenScratch(NamedTuple):
    """(H, B T) each. dnum: dnum / dh. r, u: README.md, over other tiles' tokens too; pairs: what
    pairs of the own tile give dlf; dli: dLoss/dli but for m; dm: at the token alone."""

    key_log: Any
    query_log: Any
    dnum: Any
    dden: Any
    dm: Any
    r: Any
    u: Any
    pairs: Any
    dli: Any


class TileScratch(NamedTuple):
    """(H, tiles) each. m, m_end: before the tile and at its end. What of dLoss/dm at the next tile
    arrives before this one, times `open` (0 or 1), and what its own tokens give, `through`."""

    decay: Any
    m: Any
    m_end: Any
    open: Any
    through: Any


@triton.jit(do_not_specialize=[*GATE_STRIDES, "T", "BT", "slots", "eps"])
def prepare_kernel(
    i_ptr,
    f_ptr,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    states,
    row_m,
    row_den,
    token_scratch,
    tile_scratch,
    eps,
    packing,
    T,
    BT,
    slots,
    H,
    TILE: tl.constexpr,
    PER: tl.constexpr,
    INPUT_GATE: tl.constexpr,
    NORMALIZER: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What a tile's gates and divisors make, for the kernels that meet it many times."""
    gates = GateRows(i_ptr, f_ptr, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh)
    sizes = Sizes(T, BT, slots, H)
    head = tl.program_id(1)
    here = locate(packing, sizes, TILE, PACKED)
    at, own = here.at, here.own
    if own * TILE >= at.length:
        return
    t = own * TILE + tl.arange(0, TILE)
    inside = t < at.length
    lf = load_log_f(gates, at, head, t, at.length)
    rows = (at.token + t) * H + head
    m = tl.load(row_m + rows, inside, other=0.0)
    dnum, _, _ = row_scale(tl.load(row_den + rows, inside, other=1.0), m, eps, NORMALIZER)
    to = here.tokens + t
    tl.store(token_scratch.query_log + to, tl.cumsum(lf, 0) - finite_base(m), inside)
    log = load_key_log(gates, at, head, t, own * TILE + TILE, INPUT_GATE)
    tl.store(token_scratch.key_log + to, log, inside)
    tl.store(token_scratch.dnum + to, dnum, inside)
    tl.store(tile_scratch.decay + here.tiles + own, tl.sum(lf, 0))
    last = tl.minimum(own * TILE + TILE, at.length) - 1
    tl.store(tile_scratch.m_end + here.tiles + own, tl.load(row_m + (at.token + last) * H + head))
    if own * TILE % INTERVAL == 0:
        before = states.m + here.interval * H + head
    else:
        before = row_m + (at.token + own * TILE - 1) * H + head
    tl.store(tile_scratch.m + here.tiles + own, tl.load(before))


@triton.jit
def takes(gates, row_m, tile_m, here, head, H, t, TILE: tl.constexpr, INPUT_GATE: tl.constexpr):
    """1 where m is li: the gradient of m goes there, and no further back."""
    at = here.at
    rows = (at.token + t - 1) * H + head
    before = tl.load(row_m + rows, (t % TILE > 0) & (t < at.length), other=0.0)
    before = tl.where(t % TILE > 0, before, tl.load(tile_m + here.tiles + here.own))
    kept = before + load_log_f(gates, at, head, t, at.length)
    return (load_log_i(gates, at, head, t, at.length, INPUT_GATE) > kept).to(tl.int32)


@triton.jit(do_not_specialize=[*GATE_STRIDES, "T", "BT", "slots", "scale", "eps"])
def queries_kernel(
    q,
    k,
    v,
    dh,
    dq,
    i_ptr,
    f_ptr,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    states,
    row_m,
    row_den,
    token_scratch,
    tile_scratch,
    crossings,
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
):
    """dq, dden, and what pairs of a row give the gates."""
    gates = GateRows(i_ptr, f_ptr, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(2)
    here = locate(packing, sizes, TILE, PACKED)
    at, own, tokens, tiles, row = here.at, here.own, here.tokens, here.tiles, here.interval
    if own * TILE >= at.length:
        return
    t = own * TILE + tl.arange(0, TILE)
    inside = t < at.length
    kk, vv = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)

    # The state before the interval.
    r = tl.zeros((TILE,), tl.float32)
    r_den = tl.zeros((TILE,), tl.float32)
    dq_tile = tl.zeros((TILE, BLOCK_K), tl.float32)
    for first_k in tl.range(0, K, BLOCK_K):
        ks = first_k + tl.arange(0, BLOCK_K)
        through = tl.zeros((TILE, BLOCK_K), tl.float32)
        n = tl.zeros((BLOCK_K,), tl.float32)
        for first_v in tl.range(0, V, BLOCK_C):
            vs = first_v + tl.arange(0, BLOCK_C)
            c, n = load_block(states, row, head, H, ks, vs, K, V)
            dh_block = load_tile(dh, at, head, own, vs, V, TILE)
            through += dot(dh_block, tl.trans(c), DOT)
        q_block = load_tile(q, at, head, own, ks, K, TILE).to(tl.float32)
        r += tl.sum(q_block * through, 1)
        r_den += tl.sum(q_block * n[None, :], 1)
        if first_k == block * BLOCK_K:
            dq_tile = through
    query_log = tl.load(token_scratch.query_log + tokens + t, inside, other=float("-inf"))
    dnum = tl.load(token_scratch.dnum + tokens + t, inside, other=0.0)
    p = own // PER * PER + tl.arange(0, PER)
    before = tl.sum(tl.load(tile_scratch.decay + tiles + p, p < own, other=0.0), 0)
    before += tl.load(states.m + row * H + head)
    inter = tl.exp(query_log + before)
    r *= scale * inter * dnum
    r_den *= scale * inter
    dq_tile *= (inter * dnum)[:, None]

    # Earlier tiles of the interval, from the last to the first.
    q_tile = load_tile(q, at, head, own, kk, K, TILE)
    dh_tile = load_tile(dh, at, head, own, vv, V, TILE)
    pairs = r * 0.0
    pairs_den = r * 0.0
    for back in tl.range(1, own % PER + 1):
        s = t - back * TILE
        log_s = tl.load(token_scratch.key_log + tokens + s)
        largest = tl.max(log_s, 0)
        k_tile = load_tile(k, at, head, own - back, kk, K, TILE)
        v_tile = load_tile(v, at, head, own - back, vv, V, TILE)
        D = tl.exp(query_log + largest)[:, None] * tl.exp(log_s - finite_base(largest))[None, :]
        P = (
            product(q_tile, k_tile, q, k, at, head, own, own - back, K, BLOCK_K, TILE, DOT)
            * scale
            * D
        )
        pairs_den += tl.sum(P, 1)
        dP = (
            product(dh_tile, v_tile, dh, v, at, head, own, own - back, V, BLOCK_V, TILE, DOT)
            * dnum[:, None]
        )
        pairs += tl.sum(P * dP, 1)
        dq_tile += dot(D * dP, k_tile, DOT)
        query_log += tl.load(tile_scratch.decay + tiles + own - back)

    # The own tile; <dh, h> is then whole, and with it dden.
    lf = load_log_f(gates, at, head, t, at.length)
    li = load_log_i(gates, at, head, t, at.length, INPUT_GATE)
    rows = (at.token + t) * H + head
    m = tl.load(row_m + rows, inside, other=0.0)
    D = tl.exp(own_logs(lf, li, 0, TILE) - finite_base(m)[:, None])
    k_tile = load_tile(k, at, head, own, kk, K, TILE)
    v_tile = load_tile(v, at, head, own, vv, V, TILE)
    P = product(q_tile, k_tile, q, k, at, head, own, own, K, BLOCK_K, TILE, DOT) * scale * D
    dP = product(dh_tile, v_tile, dh, v, at, head, own, own, V, BLOCK_V, TILE, DOT) * dnum[:, None]
    dh_h = r + pairs + tl.sum(P * dP, 1)
    den = tl.load(row_den + rows, inside, other=1.0)
    _, dden, dm = row_scale(den, m, eps, NORMALIZER)
    dden *= dh_h
    dm *= dh_h
    dq_tile += dot(D * (dP + dden[:, None]), k_tile, DOT)

    # What dden adds from the state and from earlier tiles. Read again, as registers are scarce.
    if NORMALIZER != "none":
        query_log = tl.load(
            token_scratch.query_log + tokens + t, inside, other=float("-inf"), volatile=True
        )
        n = tl.load(states.n + (row * H + head) * K + kk, kk < K, other=0.0)
        dq_tile += (tl.exp(query_log + before) * dden)[:, None] * n[None, :]
        for back in tl.range(1, own % PER + 1):
            s = t - back * TILE
            log_s = tl.load(token_scratch.key_log + tokens + s)
            largest = tl.max(log_s, 0)
            key_weight = tl.exp(log_s - finite_base(largest))
            D = (dden * tl.exp(query_log + largest))[:, None] * key_weight[None, :]
            dq_tile += dot(D, load_tile(k, at, head, own - back, kk, K, TILE), DOT)
            query_log += tl.load(tile_scratch.decay + tiles + own - back)
    store_tile(dq, at, head, own, kk, scale * dq_tile, K, TILE)
    if block == 0:
        r += dden * r_den
        tl.store(token_scratch.dden + tokens + t, dden, inside)
        tl.store(token_scratch.r + tokens + t, r + pairs + dden * pairs_den, inside)
        at_pair = (row * H + head) * 2 * PER * 2 * PER
        store_sum(crossings + at_pair + own % PER * 2 * PER, tl.where(inside, r, 0.0))
        if INPUT_GATE == "exp":
            tl.store(token_scratch.dm + tokens + t, dm, inside)
            taken = takes(gates, row_m, tile_scratch.m, here, head, H, t, TILE, INPUT_GATE)
            arriving = inside & (tl.cumsum(taken, 0) == 0)
            store_sum(tile_scratch.through + tiles + own, tl.where(arriving, dm, 0.0))
            tl.store(tile_scratch.open + tiles + own, (tl.sum(taken, 0) == 0).to(tl.float32))
