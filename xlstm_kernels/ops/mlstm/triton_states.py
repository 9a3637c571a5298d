"""States of the mLSTM before every interval, and the states' gradients after it, in Triton.

  C = keep C + sum_j take_j k_j v_j^T      keep = exp(decay + m - m')   take_j = exp(key_log_j - m')
  dC = keep dC + sum_i inter_i q_i dnum_i^T               inter_i = scale exp(query_log_i + m)
n and dn likewise, with 1 for v and dden for dnum. decay, key_log and query_log: triton_tiles.py.
Source: Tiled Flash Linear Attention, arXiv 2503.14376, section 3, and README.md beside this file.
States (intervals, H, K, V), (intervals, H, K), (intervals, H) and accumulators are float32.
Programs: one block of one head's state each, walking the sequence; with SPLIT, walking an interval
from nothing, after which scan_kernel makes one sequence of the intervals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .triton_tiles import (
    GATE_STRIDES,
    INTERVAL,
    GateRows,
    Sizes,
    finite_base,
    first_slot,
    indices,
    load_block,
    load_key_log,
    load_log_f,
    load_tile,
    owner,
    place,
    store_block,
)


@triton.jit
def walk(row, packing, sizes, TILE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr):
    """The sequence, the slot of its first interval, and the tiles to walk."""
    if SPLIT:
        at = place(owner(row, packing.intervals, sizes, INTERVAL, PACKED), packing, sizes, PACKED)
        slot = first_slot(at, sizes, INTERVAL, PACKED)
        first = (row - slot).to(tl.int32) * (INTERVAL // TILE)
        return at, slot, first, tl.minimum(first + INTERVAL // TILE, tl.cdiv(at.length, TILE))
    else:
        at = place(row, packing, sizes, PACKED)
        return at, first_slot(at, sizes, INTERVAL, PACKED), 0, tl.cdiv(at.length, TILE)


@triton.jit(do_not_specialize=[*GATE_STRIDES, "T", "BT", "slots"])
def states_kernel(
    k,
    v,
    i_ptr,
    f_ptr,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    initial,
    states,
    last,
    key_log,
    decay,
    tile_m,
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
    INPUT_GATE: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Also key_log of every token, and decay and m before every tile; with SPLIT, m from nothing,
    and an interval's own state in place of the one before it."""
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K) * tl.cdiv(V, BLOCK_V)
    gates = GateRows(i_ptr, f_ptr, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(0) % BLOCKS
    kk, vv = indices(block, V, BLOCK_K, BLOCK_V)
    at, slot, first, end = walk(tl.program_id(0) // BLOCKS, packing, sizes, TILE, PACKED, SPLIT)
    tiles = head.to(tl.int64) * sizes.slots + first_slot(at, sizes, TILE, PACKED)
    tokens = head.to(tl.int64) * sizes.BT + at.token

    c = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    n = tl.zeros((BLOCK_K,), tl.float32)
    m = tl.sum(n, 0)
    if HAS_INITIAL and not SPLIT:
        c, n = load_block(initial, at.sequence, head, H, kk, vv, K, V)
        m = tl.load(initial.m + at.sequence * H + head)
    if SPLIT and INPUT_GATE == "exp":
        m += float("-inf")
    for x in tl.range(first, end):
        t = x * TILE + tl.arange(0, TILE)
        if not SPLIT and x % PER == 0:
            store_block(states, slot + x // PER, head, H, kk, vv, c, n, K, V)
            if block == 0:
                tl.store(states.m + (slot + x // PER) * H + head, m)
        log = load_key_log(gates, at, head, t, x * TILE + TILE, INPUT_GATE)
        total = tl.sum(load_log_f(gates, at, head, t, at.length), 0)
        if block == 0:
            tl.store(key_log + tokens + t, log, t < at.length)
            tl.store(decay + tiles + x, total)
            tl.store(tile_m + tiles + x, m)
        kept = total + m
        m = tl.maximum(kept, tl.max(log, 0)) if INPUT_GATE == "exp" else finite_base(m) * 0.0
        base = finite_base(m)
        keep = tl.exp(kept - base)
        k_tile = load_tile(k, at, head, x, kk, K, TILE).to(tl.float32)
        k_tile *= tl.exp(log - base)[:, None]
        v_tile = load_tile(v, at, head, x, vv, V, TILE)
        c = c * keep + dot(tl.trans(k_tile), v_tile, DOT)
        n = n * keep + tl.sum(k_tile, 0)
    row = at.sequence
    if SPLIT:
        row = slot + first // PER
        last = states
    if not SPLIT or first < end:
        store_block(last, row, head, H, kk, vv, c, n, K, V)
        if block == 0:
            tl.store(last.m + row * H + head, m)


@triton.jit(do_not_specialize=["T", "BT", "slots"])
def scan_kernel(
    initial,
    states,
    own_m,
    last,
    decay,
    tile_m,
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
    INPUT_GATE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """In place, from the intervals' own states, their m in own_m, the states before them, and m
    before every tile. m' = max(decay + m, own m), c' = exp(decay + m - m') c + exp(own m - m') own
    c."""
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K) * tl.cdiv(V, BLOCK_V)
    sizes = Sizes(T, BT, slots, H)
    head, block = tl.program_id(1), tl.program_id(0) % BLOCKS
    kk, vv = indices(block, V, BLOCK_K, BLOCK_V)
    at, slot, _, end = walk(tl.program_id(0) // BLOCKS, packing, sizes, TILE, PACKED, False)
    tiles = head.to(tl.int64) * sizes.slots + first_slot(at, sizes, TILE, PACKED)
    p = tl.arange(0, PER)

    c = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    n = tl.zeros((BLOCK_K,), tl.float32)
    m = tl.sum(n, 0)
    if HAS_INITIAL:
        c, n = load_block(initial, at.sequence, head, H, kk, vv, K, V)
        m = tl.load(initial.m + at.sequence * H + head)
    for first in tl.range(0, end, PER):
        row = slot + first // PER
        own_c, own_n = load_block(states, row, head, H, kk, vv, K, V)
        added = tl.load(own_m + row * H + head)
        store_block(states, row, head, H, kk, vv, c, n, K, V)
        total = tl.sum(tl.load(decay + tiles + first + p, first + p < end, other=0.0), 0)
        if block == 0:
            tl.store(states.m + row * H + head, m)
            inside = first + p < end
            before = tl.load(decay + tiles + first + p - 1, inside & (p > 0), other=0.0)
            tile = tl.load(tile_m + tiles + first + p, inside, other=0.0)
            tile = tl.maximum(tl.cumsum(before, 0) + m, tile)
            tl.store(tile_m + tiles + first + p, tile, inside)
        kept = total + m
        m = tl.maximum(kept, added) if INPUT_GATE == "exp" else finite_base(m) * 0.0
        keep, add = tl.exp(kept - finite_base(m)), tl.exp(added - finite_base(m))
        c = keep * c + add * own_c
        n = keep * n + add * own_n
    store_block(last, at.sequence, head, H, kk, vv, c, n, K, V)
    if block == 0:
        tl.store(last.m + at.sequence * H + head, m)
