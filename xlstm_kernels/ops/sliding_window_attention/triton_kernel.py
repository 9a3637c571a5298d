"""Sliding-window attention in Triton: the kernels whose programs are queries, and what those of
triton_keys.py share with them.

  s_tj = scale <q_t, k_j>     lse_t = log2 sum_j 2^(s_tj log2 e)     p_tj = 2^(s_tj log2 e - lse_t)
  h_t  = sum_j p_tj v_j       delta_t = <dh_t, h_t>
  ds_tj = scale p_tj (<dh_t, v_j> - delta_t)
  dq_t = sum_j ds_tj k_j      dk_j = sum_t ds_tj q_t       dv_j = sum_t p_tj dh_t
over the pairs in which t sees j: those with t - window < j <= t, and first tokens j < sinks before
the window. Source: FlashAttention-2, arXiv 2307.08691, section 3, for both passes.
q, h (B, T, H, D or E), k, v (B, T, G, D or E), lse and delta (H, B T) float32.
Programs: a tile of tokens of one head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .shapes import SPAN

SPAN_TOKENS = tl.constexpr(SPAN)
LOG2_E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """A (B, T, H, D) tensor with neighbours in D side by side, and its other strides."""

    ptr: Any
    b: Any
    t: Any
    h: Any


class Sizes(NamedTuple):
    """Lengths that vary from call to call: BT is B times T, group the query heads of a key's.
    Kernels take them apart: within a tuple Triton specialises on each, whatever `do_not_specialize`
    says."""

    T: Any
    BT: Any
    group: Any
    window: Any
    sinks: Any
    scale: Any


class Place(NamedTuple):
    """A tile: the row of its sequence in a (B, T) tensor, where that begins in (T,) and in (B T,),
    its length, the tile's first token in it, and the sequence's first span of all spans."""

    batch: Any
    begin: Any
    token: Any
    length: Any
    first: Any
    span: Any


@triton.jit
def locate(table, sizes, TILE: tl.constexpr, PACKED: tl.constexpr):
    slot = tl.program_id(0)
    if PACKED:
        row = table + slot * 4
        begin, length = tl.load(row).to(tl.int64), tl.load(row + 1)
        return Place(begin * 0, begin, begin, length, tl.load(row + 2), tl.load(row + 3))
    else:
        per = tl.cdiv(sizes.T, TILE)
        batch = (slot // per).to(tl.int64)
        spans = batch * tl.cdiv(sizes.T, SPAN_TOKENS)
        return Place(batch, batch * 0, batch * sizes.T, sizes.T, slot % per * TILE, spans)


@triton.jit
def load_rows(x, at, head, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """TILE tokens of a head from `first` on; zero beyond the sequence's end and the width."""
    r, d = tl.arange(0, TILE), tl.arange(0, BLOCK)
    start = x.ptr + at.batch * x.b + (at.begin + first) * x.t + head.to(tl.int64) * x.h
    mask = (first + r < at.length)[:, None] & (d < WIDTH)[None, :]
    return tl.load(start + (r[:, None] * x.t + d[None, :]), mask, other=0.0)


@triton.jit
def store_rows(x, at, head, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The program's own tile."""
    r, d = tl.arange(0, TILE), tl.arange(0, BLOCK)
    start = x.ptr + at.batch * x.b + (at.begin + at.first) * x.t + head.to(tl.int64) * x.h
    mask = (at.first + r < at.length)[:, None] & (d < WIDTH)[None, :]
    tl.store(start + (r[:, None] * x.t + d[None, :]), values.to(x.ptr.dtype.element_ty), mask)


@triton.jit
def key_blocks(at, sizes, TILE: tl.constexpr, KEYS: tl.constexpr):
    """Of the program's queries: blocks of first tokens before any window, the first token of the
    blocks of windows, and all blocks."""
    last = tl.minimum(at.first + TILE, at.length) - 1
    early = tl.cdiv(tl.maximum(tl.minimum(sizes.sinks, last - sizes.window + 1), 0), KEYS)
    nearest = tl.maximum(at.first - sizes.window + 1, 0)
    return early, nearest, early + tl.cdiv(last + 1 - nearest, KEYS)


@triton.jit
def log2_scores(products, t, j, near, at, sizes):
    """s log2 e from the products of tokens `t` and `j`, one along each axis; -inf where t does not
    see j by the window (`near`), or else as a first token before it."""
    back = t - j
    by_window = (back >= 0) & (back < sizes.window)
    first = (back >= sizes.window) & (j < sizes.sinks)
    seen = tl.where(near, by_window, first) & (t < at.length)
    return tl.where(seen, products * (sizes.scale * LOG2_E), float("-inf"))


@triton.jit(do_not_specialize=["T", "BT", "window", "sinks"])
def forward_kernel(
    q,
    k,
    v,
    h,
    lse,
    table,
    T,
    BT,
    group,
    window,
    sinks,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
):
    sizes = Sizes(T, BT, group, window, sinks, scale)
    at = locate(table, sizes, TILE, PACKED)
    head = tl.program_id(1)
    t = at.first + tl.arange(0, TILE)
    q_tile = load_rows(q, at, head, at.first, D, BLOCK_D, TILE)
    m = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, BLOCK_E), tl.float32)
    early, nearest, blocks = key_blocks(at, sizes, TILE, KEYS)
    for n in tl.range(0, blocks):
        near = n >= early
        first = tl.where(near, nearest + (n - early) * KEYS, n * KEYS)
        j = first + tl.arange(0, KEYS)
        k_tile = load_rows(k, at, head // sizes.group, first, D, BLOCK_D, KEYS)
        scores = dot(q_tile, tl.trans(k_tile), DOT)
        scores = log2_scores(scores, t[:, None], j[None, :], near, at, sizes)
        largest = tl.maximum(m, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score, and sums of 0.
        by = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp2(scores - by[:, None])
        shrink = tl.exp2(m - by)
        total = total * shrink + tl.sum(p, 1)
        v_tile = load_rows(v, at, head // sizes.group, first, E, BLOCK_E, KEYS)
        sums = sums * shrink[:, None] + dot(p, v_tile, DOT)
        m = largest
    inside = t < at.length
    total = tl.where(inside, total, 1.0)
    store_rows(h, at, head, sums / total[:, None], E, BLOCK_E, TILE)
    tl.store(lse + head.to(tl.int64) * sizes.BT + at.token + t, m + tl.log2(total), inside)


@triton.jit
def load_totals(x, head, at, t, sizes, other):
    return tl.load(x + head.to(tl.int64) * sizes.BT + at.token + t, t < at.length, other=other)


@triton.jit(do_not_specialize=["T", "BT", "window", "sinks"])
def queries_kernel(
    q,
    k,
    v,
    h,
    dh,
    dq,
    lse,
    delta,
    table,
    T,
    BT,
    group,
    window,
    sinks,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dq, and delta for the kernels after it."""
    sizes = Sizes(T, BT, group, window, sinks, scale)
    at = locate(table, sizes, TILE, PACKED)
    head = tl.program_id(1)
    t = at.first + tl.arange(0, TILE)
    dh_tile = load_rows(dh, at, head, at.first, E, BLOCK_E, TILE)
    h_tile = load_rows(h, at, head, at.first, E, BLOCK_E, TILE)
    deltas = tl.sum(dh_tile.to(tl.float32) * h_tile.to(tl.float32), 1)
    places = delta + head.to(tl.int64) * sizes.BT + at.token + t
    tl.store(places, deltas, t < at.length)
    q_tile = load_rows(q, at, head, at.first, D, BLOCK_D, TILE)
    totals = load_totals(lse, head, at, t, sizes, 0.0)
    sums = tl.zeros((TILE, BLOCK_D), tl.float32)
    early, nearest, blocks = key_blocks(at, sizes, TILE, KEYS)
    for n in tl.range(0, blocks):
        near = n >= early
        first = tl.where(near, nearest + (n - early) * KEYS, n * KEYS)
        j = first + tl.arange(0, KEYS)
        k_tile = load_rows(k, at, head // sizes.group, first, D, BLOCK_D, KEYS)
        v_tile = load_rows(v, at, head // sizes.group, first, E, BLOCK_E, KEYS)
        scores = dot(q_tile, tl.trans(k_tile), DOT)
        scores = log2_scores(scores, t[:, None], j[None, :], near, at, sizes)
        p = tl.exp2(scores - totals[:, None])
        ds = p * (dot(dh_tile, tl.trans(v_tile), DOT) - deltas[:, None])
        sums += dot(ds, k_tile, DOT)
    store_rows(dq, at, head, sums * sizes.scale, D, BLOCK_D, TILE)
