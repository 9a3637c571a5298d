"""Sliding-window attention in Triton.

  s_tj = scale <q_t, k_j>     lse_t = log2 sum_j 2^(s_tj log2 e)     p_tj = 2^(s_tj log2 e - lse_t)
  h_t  = sum_j p_tj v_j       delta_t = <dh_t, h_t>
  ds_tj = scale p_tj (<dh_t, v_j> - delta_t)
  dq_t = sum_j ds_tj k_j      dk_j = sum_t ds_tj q_t       dv_j = sum_t p_tj dh_t
over the pairs in which t sees j: those with t - window < j <= t, and first tokens j < sinks before
the window. Source: FlashAttention-2, arXiv 2307.08691, section 3, for both passes.
q, h (B, T, H, D or E), k, v (B, T, G, D or E), lse and delta (H, B T) float32.
Programs: a tile of tokens of one head. Few tokens are first ones, and all see them: their gradients
are summed over spans of SPAN queries side by side, then in order, so that no atomics are needed.
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
    """Lengths that vary from call to call: tokens is B T, group the query heads of a key's."""

    T: Any
    tokens: Any
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


@triton.jit(do_not_specialize=["sizes", "table"])
def forward_kernel(
    q,
    k,
    v,
    h,
    lse,
    table,
    sizes,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
):
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
    tl.store(lse + head.to(tl.int64) * sizes.tokens + at.token + t, m + tl.log2(total), inside)


@triton.jit
def load_totals(x, head, at, t, sizes, other):
    return tl.load(x + head.to(tl.int64) * sizes.tokens + at.token + t, t < at.length, other=other)


@triton.jit(do_not_specialize=["sizes", "table"])
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
    sizes,
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
    at = locate(table, sizes, TILE, PACKED)
    head = tl.program_id(1)
    t = at.first + tl.arange(0, TILE)
    dh_tile = load_rows(dh, at, head, at.first, E, BLOCK_E, TILE)
    h_tile = load_rows(h, at, head, at.first, E, BLOCK_E, TILE)
    deltas = tl.sum(dh_tile.to(tl.float32) * h_tile.to(tl.float32), 1)
    places = delta + head.to(tl.int64) * sizes.tokens + at.token + t
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


@triton.jit
def add_queries(
    dk_sums,
    dv_sums,
    k_tile,
    v_tile,
    j,
    near,
    inputs,
    head,
    first,
    at,
    sizes,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """What TILE queries of a head from `first` on add to dk and dv of keys `j`."""
    t = first + tl.arange(0, TILE)
    q_tile = load_rows(inputs.q, at, head, first, D, BLOCK_D, TILE)
    dh_tile = load_rows(inputs.dh, at, head, first, E, BLOCK_E, TILE)
    totals = load_totals(inputs.lse, head, at, t, sizes, 0.0)
    deltas = load_totals(inputs.delta, head, at, t, sizes, 0.0)
    # Keys are the rows: those of Hopper's products are 64 or more, and queries may be fewer.
    scores = dot(k_tile, tl.trans(q_tile), DOT)
    scores = log2_scores(scores, t[None, :], j[:, None], near, at, sizes)
    p = tl.exp2(scores - totals[None, :])
    dv_sums += dot(p, dh_tile, DOT)
    ds = p * (dot(v_tile, tl.trans(dh_tile), DOT) - deltas[None, :])
    dk_sums += dot(ds, q_tile, DOT)
    return dk_sums, dv_sums


class Queries(NamedTuple):
    """What keys need of the queries that see them."""

    q: Any
    dh: Any
    lse: Any
    delta: Any


@triton.jit(do_not_specialize=["sizes", "table"])
def sinks_kernel(
    inputs,
    k,
    v,
    dk_parts,
    dv_parts,
    table,
    sizes,
    G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dk_parts (spans, G, sinks, D) and dv_parts (spans, G, sinks, E), float32: what the queries of
    a span add to the first tokens before their windows."""
    at = locate(table, sizes, SPAN_TOKENS, PACKED)
    head = tl.program_id(1)
    j0 = tl.program_id(2) * KEYS
    j = j0 + tl.arange(0, KEYS)
    k_tile = load_rows(k, at, head, j0, D, BLOCK_D, KEYS)
    v_tile = load_rows(v, at, head, j0, E, BLOCK_E, KEYS)
    dk_sums = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv_sums = tl.zeros((KEYS, BLOCK_E), tl.float32)
    end = tl.minimum(at.first + SPAN_TOKENS, at.length)
    begin = tl.maximum(at.first, j0 + sizes.window)  # no earlier query is beyond the window
    tiles = tl.cdiv(tl.maximum(end - begin, 0), TILE)
    for n in tl.range(0, tiles * sizes.group):
        query_head = head * sizes.group + n // tiles
        first = begin + n % tiles * TILE
        # The last tile of a span may reach into the next one's.
        own = Place(at.batch, at.begin, at.token, end, at.first, at.span)
        dk_sums, dv_sums = add_queries(
            dk_sums,
            dv_sums,
            k_tile,
            v_tile,
            j,
            False,
            inputs,
            query_head,
            first,
            own,
            sizes,
            D,
            E,
            BLOCK_D,
            BLOCK_E,
            TILE,
            DOT,
        )
    row = ((at.span + at.first // SPAN_TOKENS) * G + head) * sizes.sinks + j
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside = (j < sizes.sinks)[:, None]
    tl.store(dk_parts + (row[:, None] * D + d[None, :]), dk_sums, inside & (d < D)[None, :])
    tl.store(dv_parts + (row[:, None] * E + e[None, :]), dv_sums, inside & (e < E)[None, :])


@triton.jit
def load_part(parts, row, j, sizes, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    inside = (j < sizes.sinks)[:, None] & (d < WIDTH)[None, :]
    return tl.load(parts + (row[:, None] * WIDTH + d[None, :]), inside, other=0.0)


@triton.jit(do_not_specialize=["sizes", "table"])
def keys_kernel(
    inputs,
    k,
    v,
    dk,
    dv,
    dk_parts,
    dv_parts,
    table,
    sizes,
    G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
    PACKED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """dk and dv: what the queries add whose windows hold the program's keys, and the parts."""
    at = locate(table, sizes, KEYS, PACKED)
    head = tl.program_id(1)
    j = at.first + tl.arange(0, KEYS)
    k_tile = load_rows(k, at, head, at.first, D, BLOCK_D, KEYS)
    v_tile = load_rows(v, at, head, at.first, E, BLOCK_E, KEYS)
    dk_sums = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv_sums = tl.zeros((KEYS, BLOCK_E), tl.float32)
    end = tl.minimum(at.first + KEYS - 1 + sizes.window, at.length)
    tiles = tl.cdiv(end - at.first, TILE)
    for n in tl.range(0, tiles * sizes.group):
        query_head = head * sizes.group + n // tiles
        first = at.first + n % tiles * TILE
        dk_sums, dv_sums = add_queries(
            dk_sums,
            dv_sums,
            k_tile,
            v_tile,
            j,
            True,
            inputs,
            query_head,
            first,
            at,
            sizes,
            D,
            E,
            BLOCK_D,
            BLOCK_E,
            TILE,
            DOT,
        )
    if SINKS:  # noqa: SIM102, known to the compiler
        if at.first < sizes.sinks:
            for n in tl.range(0, tl.cdiv(at.length, SPAN_TOKENS)):
                row = ((at.span + n) * G + head) * sizes.sinks + j
                dk_sums += load_part(dk_parts, row, j, sizes, D, BLOCK_D)
                dv_sums += load_part(dv_parts, row, j, sizes, E, BLOCK_E)
    store_rows(dk, at, head, dk_sums * sizes.scale, D, BLOCK_D, KEYS)
    store_rows(dv, at, head, dv_sums, E, BLOCK_E, KEYS)
