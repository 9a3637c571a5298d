"""Gradients of sliding-window attention's keys and values, in Triton: the equations and the tensors
are triton_kernel.py's.

Programs: a tile of keys of one head. Few tokens are first ones, and all see them: their gradients
are summed over spans of SPAN queries side by side, then in order, so that no atomics are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_products import dot
from .triton_kernel import (
    SPAN_TOKENS,
    Place,
    Sizes,
    load_rows,
    load_totals,
    locate,
    log2_scores,
    store_rows,
)


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


@triton.jit(do_not_specialize=["T", "BT", "window", "sinks"])
def sinks_kernel(
    inputs,
    k,
    v,
    dk_parts,
    dv_parts,
    table,
    T,
    BT,
    group,
    window,
    sinks,
    scale,
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
    sizes = Sizes(T, BT, group, window, sinks, scale)
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


@triton.jit(do_not_specialize=["T", "BT", "window", "sinks"])
def keys_kernel(
    inputs,
    k,
    v,
    dk,
    dv,
    dk_parts,
    dv_parts,
    table,
    T,
    BT,
    group,
    window,
    sinks,
    scale,
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
    sizes = Sizes(T, BT, group, window, sinks, scale)
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
