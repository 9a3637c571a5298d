"""Gradients of the mLSTM's keys, values and gates, in Triton.

  dk_j = scale sum_i dS_ij q_i + out_j (dC' v_j + dn')   out_j = exp(key_log_j + decays after - m')
  dv_j = sum_i P_ij dnum_i + out_j dC'^T k_j             W_ij = scale <q_i, k_j> dS_ij
  dli_j = sum_i W_ij + u_j                               u_j = <k_j, dk_j> of its part with out_j
  dlf_t = sum_{i >= t > j} W_ij + sum_{i >= t} r_i + sum_{j < t} u_j + carry
over an interval, (dC', dn') being the gradient of the state after it, and what m passes on. The
rest: triton_gradients.py. Source: README.md beside this file.
k, q (B, T, H, K), v, dh (B, T, H, V) and their gradients; di, df (B, T, H).
crossings (intervals, H, 2 PER, 2 PER), PER tiles to an interval: what passes over the tiles between
J and I, in row I and column J + 1. Row PER: to the state after the interval; column 0: from the one
before.
Programs: a tile of tokens of one head, and a block of keys or values. Accumulators are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .triton_gradients import takes
from .triton_tiles import (
    GATE_STRIDES,
    GateRows,
    Sizes,
    finite_base,
    load_block,
    load_gate,
    load_log_f,
    load_log_i,
    load_tile,
    locate,
    own_logs,
    product,
    store_sum,
    store_tile,
)


@triton.jit(do_not_specialize=[*GATE_STRIDES, "T", "BT", "slots", "scale"])
def keys_kernel(
    q,
    k,
    v,
    dh,
    dk,
    dv,
    i_ptr,
    f_ptr,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    dstates,
    row_m,
    token_scratch,
    tile_scratch,
    crossings,
    scale,
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
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    """dk if DK, with what pairs of a column give the gates, and dv if DV. Both, where one block is
    all keys and one all values, share the products."""
    gates = GateRows(i_ptr, f_ptr, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(2)
    here = locate(packing, sizes, TILE, PACKED)
    at, own, tokens, tiles, row = here.at, here.own, here.tokens, here.tiles, here.interval
    if own * TILE >= at.length:
        return
    r = tl.arange(0, TILE)
    t = own * TILE + r
    inside = t < at.length
    end = tl.minimum(own // PER * PER + PER, tl.cdiv(at.length, TILE))
    kk, vv = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    if DK:
        kk += block * BLOCK_K
    else:
        vv += block * BLOCK_V
    k_tile = load_tile(k, at, head, own, kk, K, TILE)
    v_tile = load_tile(v, at, head, own, vv, V, TILE)

    # The state after the interval.
    p = own // PER * PER + tl.arange(0, PER)
    after = tl.load(tile_scratch.decay + tiles + p, (p > own) & (p < end), other=0.0)
    out = tl.load(token_scratch.key_log + tokens + t, inside, other=float("-inf"))
    m_end = tl.load(tile_scratch.m_end + tiles + end - 1)
    out = tl.exp(out + tl.sum(after, 0) - finite_base(m_end))
    u = tl.zeros((TILE,), tl.float32)
    dk_tile = tl.zeros((TILE, BLOCK_K), tl.float32)
    dv_tile = tl.zeros((TILE, BLOCK_V), tl.float32)
    if DV:
        for first_k in tl.range(0, K, BLOCK_C):
            ks = first_k + tl.arange(0, BLOCK_C)
            dc, _ = load_block(dstates, row, head, H, ks, vv, K, V)
            dv_tile += dot(load_tile(k, at, head, own, ks, K, TILE), dc, DOT)
    if DK:
        for first_k in tl.range(0, K, BLOCK_K):
            ks = first_k + tl.arange(0, BLOCK_K)
            through = tl.zeros((TILE, BLOCK_K), tl.float32)
            dn = tl.zeros((BLOCK_K,), tl.float32)
            for first_v in tl.range(0, V, BLOCK_C):
                vs = first_v + tl.arange(0, BLOCK_C)
                dc, dn = load_block(dstates, row, head, H, ks, vs, K, V)
                v_block = load_tile(v, at, head, own, vs, V, TILE)
                through += dot(v_block, tl.trans(dc), DOT)
            through += dn[None, :]
            k_block = k_tile
            if K > BLOCK_K:
                k_block = load_tile(k, at, head, own, ks, K, TILE)
            u += tl.sum(k_block.to(tl.float32) * through, 1)
            if first_k == block * BLOCK_K:
                dk_tile = through
    u *= out
    dk_tile *= out[:, None]
    dv_tile *= out[:, None]

    # The own tile; rows are keys.
    lf = load_log_f(gates, at, head, t, at.length)
    li = load_log_i(gates, at, head, t, at.length, INPUT_GATE)
    m = tl.load(row_m + (at.token + t) * H + head, inside, other=float("inf"))
    D = tl.exp(own_logs(lf, li, 1, TILE) - finite_base(m)[None, :])
    q_tile = load_tile(q, at, head, own, kk, K, TILE)
    dh_tile = load_tile(dh, at, head, own, vv, V, TILE)
    dnum = tl.load(token_scratch.dnum + tokens + t, inside, other=0.0)
    P = product(k_tile, q_tile, k, q, at, head, own, own, K, BLOCK_K, TILE, DOT) * scale * D
    if DV:
        dv_tile += dot(P * dnum[None, :], dh_tile, DOT)
    dli = u
    pairs = u * 0.0
    at_pair = (row * H + head) * 2 * PER * 2 * PER + own % PER + 1
    if DK:
        dS = (
            product(v_tile, dh_tile, v, dh, at, head, own, own, V, BLOCK_V, TILE, DOT)
            * dnum[None, :]
        )
        dS += tl.load(token_scratch.dden + tokens + t, inside, other=0.0)[None, :]
        dk_tile += dot(dS * D * scale, q_tile, DOT)
        W = P * dS
        dli += tl.sum(W, 1)
        later = tl.cumsum(W, 1, reverse=True)
        pairs = tl.sum(tl.where(r[:, None] < r[None, :], later, 0.0), 0)
        if block == 0:
            store_sum(crossings + at_pair + PER * 2 * PER, u)

    # Later tiles of the interval.
    log = tl.load(token_scratch.key_log + tokens + t, inside, other=float("-inf"))
    largest = tl.max(log, 0)
    key_weight = tl.exp(log - finite_base(largest))
    for x in tl.range(own + 1, end):
        s = t + (x - own) * TILE
        q_tile = load_tile(q, at, head, x, kk, K, TILE)
        dh_tile = load_tile(dh, at, head, x, vv, V, TILE)
        reached = s < at.length
        query_log = tl.load(token_scratch.query_log + tokens + s, reached, other=float("-inf"))
        dnum = tl.load(token_scratch.dnum + tokens + s, reached, other=0.0)
        D = key_weight[:, None] * tl.exp(query_log + largest)[None, :]
        P = product(k_tile, q_tile, k, q, at, head, own, x, K, BLOCK_K, TILE, DOT) * scale * D
        if DV:
            dv_tile += dot(P * dnum[None, :], dh_tile, DOT)
        if DK:
            dS = (
                product(v_tile, dh_tile, v, dh, at, head, own, x, V, BLOCK_V, TILE, DOT)
                * dnum[None, :]
            )
            dS += tl.load(token_scratch.dden + tokens + s, reached, other=0.0)[None, :]
            dk_tile += dot(dS * D * scale, q_tile, DOT)
            columns = tl.sum(P * dS, 1)
            dli += columns
            u += columns
            if block == 0:
                store_sum(crossings + at_pair + x % PER * 2 * PER, columns)
        # Between the own tile and the next lies this one.
        largest += tl.load(tile_scratch.decay + tiles + x)

    if DK:
        store_tile(dk, at, head, own, kk, dk_tile, K, TILE)
        if block == 0:
            tl.store(token_scratch.u + tokens + t, u, inside)
            tl.store(token_scratch.dli + tokens + t, dli, inside)
            tl.store(token_scratch.pairs + tokens + t, pairs, inside)
    if DV:
        store_tile(dv, at, head, own, vv, dv_tile, V, TILE)


@triton.jit
def arriving_m(tile_scratch, tiles, own, count, last):
    """dLoss/dm that arrives behind tile `own` of `count`, `last` behind the last one."""
    m = last * 0.0
    is_open = m == 0.0
    first = own + 1
    while first < count:
        x = first + tl.arange(0, 32)
        closed = 1.0 - tl.load(tile_scratch.open + tiles + x, x < count, other=1.0)
        through = tl.load(tile_scratch.through + tiles + x, x < count, other=0.0)
        m += tl.sum(tl.where(tl.cumsum(closed, 0) - closed == 0, through, 0.0), 0)
        is_open = tl.sum(closed, 0) == 0
        first = tl.where(is_open, first + 32, count)
    return m + tl.where(is_open, last, 0.0)


@triton.jit(do_not_specialize=[*GATE_STRIDES, "T", "BT", "slots"])
def gates_kernel(
    i_ptr,
    f_ptr,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    row_m,
    dlast_m,
    di,
    df,
    dinitial_m,
    token_scratch,
    tile_scratch,
    crossings,
    carry,
    packing,
    T,
    BT,
    slots,
    H,
    TILE: tl.constexpr,
    PER: tl.constexpr,
    CARRIES: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_GATE: tl.constexpr,
    PACKED: tl.constexpr,
    WANT_INITIAL: tl.constexpr,
):
    """di, df and, from the first tile, dm of the initial state. CARRIES: parts of carry; PARTS: the
    power of two that holds them."""
    gates = GateRows(i_ptr, f_ptr, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh)
    sizes = Sizes(T, BT, slots, H)
    head = tl.program_id(1)
    here = locate(packing, sizes, TILE, PACKED)
    at, own, tokens, tiles, row = here.at, here.own, here.tokens, here.tiles, here.interval
    if own * TILE >= at.length:
        return
    r = tl.arange(0, TILE)
    t = own * TILE + r
    inside = t < at.length
    count = tl.cdiv(at.length, TILE)
    end = tl.minimum(own // PER * PER + PER, count)

    # What passes over the whole tile.
    part = tl.arange(0, PARTS)
    carried = (row * H + head) * CARRIES + part
    carried = tl.sum(tl.load(carry + carried, part < CARRIES, other=0.0), 0)
    over, under = tl.arange(0, 2 * PER)[:, None], tl.arange(0, 2 * PER)[None, :]
    at_pair = (row * H + head) * 2 * PER * 2 * PER + over * 2 * PER + under
    later = (over > own % PER) & ((over < end - own // PER * PER) | (over == PER))
    crossing = later & (under <= own % PER) & ((over < PER) | (under > 0))
    crossing = tl.sum(tl.sum(tl.load(crossings + at_pair, crossing, other=0.0), 1), 0) + carried

    dli = tl.load(token_scratch.dli + tokens + t, inside, other=0.0)
    dlf = tl.load(token_scratch.pairs + tokens + t, inside, other=0.0) + crossing
    from_later = tl.load(token_scratch.r + tokens + t, inside, other=0.0)
    dlf += tl.cumsum(from_later, 0, reverse=True)
    from_earlier = tl.load(token_scratch.u + tokens + t - 1, inside & (r > 0), other=0.0)
    dlf += tl.cumsum(from_earlier, 0)

    first_m = carried * 0.0
    if INPUT_GATE == "exp":
        # <C, dC> + <n, dn> of the last state, in the terms that dli and dlf hold: they cancel.
        last_row = row - own // PER + (count - 1) // PER
        last = (last_row * H + head) * CARRIES + part
        last = -tl.sum(tl.load(carry + last, part < CARRIES, other=0.0), 0)
        p = tl.arange(0, PER)
        at_last = (last_row * H + head) * 2 * PER * 2 * PER + PER * 2 * PER + 1 + p
        valid = p <= (count - 1) % PER
        last -= tl.sum(tl.load(crossings + at_last, valid, other=0.0), 0)
        last += tl.load(dlast_m + at.sequence * H + head)
        arriving = arriving_m(tile_scratch, tiles, own, count, last)
        taken = takes(gates, row_m, tile_scratch.m, here, head, H, t, TILE, INPUT_GATE)
        before = tl.cumsum(taken, 0)
        dm = tl.load(token_scratch.dm + tokens + t, inside, other=0.0)
        # Of token r, what later tokens of the tile pass on to it, and what arrives behind them.
        reaches = (r[:, None] <= r[None, :]) & (before[:, None] == before[None, :])
        dm = tl.sum(tl.where(reaches, dm[None, :], 0.0), 1)
        dm += tl.where(before == tl.sum(taken, 0), arriving, 0.0)
        dli += tl.where(taken == 1, dm, 0.0)
        dlf += tl.where(taken == 1, 0.0, dm)
        first_m = tl.sum(tl.where((r == 0) & (taken == 0), dm, 0.0), 0)

    f = load_gate(gates.f, gates.fb, gates.ft, gates.fh, at, head, t, at.length)
    rows = (at.token + t) * H + head
    tl.store(df + rows, dlf * tl.sigmoid(-f), inside)
    if INPUT_GATE == "sigmoid":
        i = load_gate(gates.i, gates.ib, gates.it, gates.ih, at, head, t, at.length)
        dli *= tl.sigmoid(-i)
    tl.store(di + rows, dli, inside)
    if WANT_INITIAL and own == 0:
        at_first = (row * H + head) * 2 * PER * 2 * PER + tl.arange(0, PER) * 2 * PER
        of_state = tl.load(crossings + at_first, tl.arange(0, PER) < end, other=0.0)
        tl.store(dinitial_m + at.sequence * H + head, first_m + carried + tl.sum(of_state, 0))
