"""Gradients of the mLSTM's states after every interval, in Triton.

  dC = keep dC' + sum_i inter_i q_i dnum_i^T    inter_i = scale exp(query_log_i + m)
  dn = keep dn' + sum_i inter_i q_i dden_i      keep = exp(decay + m - m')
tile by tile in reverse; query_log and decay: triton_tiles.py. Source: README.md beside this file.
States (intervals, H, K, V), (intervals, H, K) and accumulators are float32. Also what the forget
gates of an interval get through its old state, keep (<C, dC'> + <n, dn'>) over the interval, in
parts, one from each block of the state: carry (intervals, H, blocks).
Programs: as in triton_states.py, walking backwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .triton_states import walk
from .triton_tiles import (
    INTERVAL,
    Sizes,
    finite_base,
    first_slot,
    indices,
    load_block,
    load_tile,
    store_block,
)


@triton.jit
def interval_keep(tile_scratch, tiles, first, end, TILE: tl.constexpr):
    """What the tiles [first, end) of an interval leave of the state before it."""
    p = first + tl.arange(0, INTERVAL // TILE)
    decay = tl.sum(tl.load(tile_scratch.decay + tiles + p, p < end, other=0.0), 0)
    m = tl.load(tile_scratch.m + tiles + first)
    return tl.exp(decay + m - finite_base(tl.load(tile_scratch.m_end + tiles + end - 1)))


@triton.jit
def finish_interval(
    states,
    dstates,
    carry,
    row,
    keep,
    head,
    H,
    k,
    v,
    dc,
    dn,
    block,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Stores dC and dn after the interval, and its carry."""
    c, n = load_block(states, row, head, H, k, v, K, V)
    through = tl.sum(tl.sum(c * dc, 1), 0)
    through += tl.where(tl.min(v, 0) == 0, tl.sum(n * dn, 0), 0.0)
    blocks = tl.cdiv(K, k.shape[0]) * tl.cdiv(V, v.shape[0])
    tl.store(carry + (row * H + head) * blocks + block, keep * through)
    store_block(dstates, row, head, H, k, v, dc, dn, K, V)


@triton.jit(do_not_specialize=["T", "BT", "slots", "scale"])
def dstates_kernel(
    q,
    dh,
    states,
    dlast,
    dstates,
    dinitial,
    carry,
    token_scratch,
    tile_scratch,
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
    TILE: tl.constexpr,
    PER: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
    WANT_INITIAL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """With SPLIT, dstates are the intervals' own: what they add before them."""
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K) * tl.cdiv(V, BLOCK_V)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(0) % BLOCKS
    kk, vv = indices(block, V, BLOCK_K, BLOCK_V)
    at, slot, first, end = walk(tl.program_id(0) // BLOCKS, packing, sizes, TILE, PACKED, SPLIT)
    tiles = head.to(tl.int64) * sizes.slots + first_slot(at, sizes, TILE, PACKED)
    tokens = head.to(tl.int64) * sizes.BT + at.token

    c = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    n = tl.zeros((BLOCK_K,), tl.float32)
    if not SPLIT:
        c, n = load_block(dlast, at.sequence, head, H, kk, vv, K, V)
    for back in tl.range(1, end - first + 1):
        x = end - back
        if not SPLIT and (back == 1 or x % PER == PER - 1):
            first_x = x // PER * PER
            keep = interval_keep(tile_scratch, tiles, first_x, x + 1, TILE)
            row = slot + x // PER
            finish_interval(states, dstates, carry, row, keep, head, H, kk, vv, c, n, block, K, V)
        t = x * TILE + tl.arange(0, TILE)
        inside = t < at.length
        m = tl.load(tile_scratch.m + tiles + x)
        keep = tl.load(tile_scratch.decay + tiles + x) + m
        keep = tl.exp(keep - finite_base(tl.load(tile_scratch.m_end + tiles + x)))
        query_log = tl.load(token_scratch.query_log + tokens + t, inside, other=float("-inf"))
        dnum = tl.load(token_scratch.dnum + tokens + t, inside, other=0.0)
        dden = tl.load(token_scratch.dden + tokens + t, inside, other=0.0)
        q_tile = load_tile(q, at, head, x, kk, K, TILE).to(tl.float32)
        q_tile *= (scale * tl.exp(query_log + m))[:, None]
        n = n * keep + tl.sum(q_tile * dden[:, None], 0)
        q_tile *= dnum[:, None]
        c = c * keep + dot(tl.trans(q_tile), load_tile(dh, at, head, x, vv, V, TILE), DOT)
    if SPLIT:
        if first < end:
            store_block(dstates, slot + first // PER, head, H, kk, vv, c, n, K, V)
    elif WANT_INITIAL:
        store_block(dinitial, at.sequence, head, H, kk, vv, c, n, K, V)


@triton.jit(do_not_specialize=["T", "BT", "slots"])
def dscan_kernel(
    states,
    dlast,
    dstates,
    dinitial,
    carry,
    tile_scratch,
    packing,
    T,
    BT,
    slots,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    PER: tl.constexpr,
    PACKED: tl.constexpr,
    WANT_INITIAL: tl.constexpr,
):
    """In place, from what the intervals add the gradients after them, and carry."""
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K) * tl.cdiv(V, BLOCK_V)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(0) % BLOCKS
    kk, vv = indices(block, V, BLOCK_K, BLOCK_V)
    at, slot, _, end = walk(tl.program_id(0) // BLOCKS, packing, sizes, TILE, PACKED, False)
    tiles = head.to(tl.int64) * sizes.slots + first_slot(at, sizes, TILE, PACKED)

    c = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    n = tl.zeros((BLOCK_K,), tl.float32)
    c, n = load_block(dlast, at.sequence, head, H, kk, vv, K, V)
    intervals = tl.cdiv(end, PER)
    for back in tl.range(1, intervals + 1):
        x = intervals - back
        own_c, own_n = load_block(dstates, slot + x, head, H, kk, vv, K, V)
        last = tl.minimum(x * PER + PER, end)
        keep = interval_keep(tile_scratch, tiles, x * PER, last, TILE)
        finish_interval(states, dstates, carry, slot + x, keep, head, H, kk, vv, c, n, block, K, V)
        c = keep * c + own_c
        n = keep * n + own_n
    if WANT_INITIAL:
        store_block(dinitial, at.sequence, head, H, kk, vv, c, n, K, V)
