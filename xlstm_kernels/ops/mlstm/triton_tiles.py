"""What the mLSTM's Triton kernels share: where a program stands, and what a tile is made of.

A sequence is cut into tiles of TILE tokens, and into intervals of STATE_INTERVAL, before each of
which a state stands. Of the tokens i of a tile, with lf and li the logarithms of the gates:
  decay       = sum of lf over the tile
  key_log_i   = li_i + sum of lf over the tile's tokens after i
  query_log_i = sum of lf over the tile's tokens up to and with i, - m_i
so that token j of tile J has, at token i of a later tile I of the same interval, the weight
  D_ij = exp(query_log_i + decay_{J+1} + ... + decay_{I-1} + key_log_j).
Every exponent is a sum, and none is a difference of sums: nothing cancels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.mlstm import LARGEST_EXPONENT
from ...cells.triton_math import log_sigmoid
from ...cells.triton_products import dot
from .shapes import STATE_INTERVAL

INTERVAL = tl.constexpr(STATE_INTERVAL)
EXPONENT_LIMIT = tl.constexpr(LARGEST_EXPONENT)


class Rows(NamedTuple):
    """A (B, T, H, D) tensor with neighbours in D side by side, and its other strides."""

    ptr: Any
    b: Any
    t: Any
    h: Any


# Strides of contiguous i and f that vary with T: not specialised, as `Sizes`. The others are, as a
# constant saves registers.
GATE_STRIDES = ("stride_ib", "stride_fb")


class GateRows(NamedTuple):
    """i and f, (B, T, H), and their strides. Kernels take them apart."""

    i: Any
    f: Any
    ib: Any
    it: Any
    ih: Any
    fb: Any
    ft: Any
    fh: Any


class State(NamedTuple):
    """c (rows, H, K, V), n (rows, H, K), m (rows, H), float32 and contiguous."""

    c: Any
    n: Any
    m: Any


class Packing(NamedTuple):
    """starts (S + 1,), and for each slot of a tile or an interval its sequence."""

    starts: Any
    tiles: Any
    intervals: Any


class Sizes(NamedTuple):
    """Lengths that vary from call to call: BT is B times T, slots the number of tiles. Kernels take
    them apart: within a tuple Triton specialises on each, whatever `do_not_specialize` says."""

    T: Any
    BT: Any
    slots: Any
    H: Any


class Place(NamedTuple):
    """A sequence: its row of a (B, T) tensor, where in it, and where in (B T,) it starts."""

    sequence: Any
    batch: Any
    start: Any
    length: Any
    token: Any


@triton.jit
def place(sequence, packing, sizes, PACKED: tl.constexpr):
    sequence = sequence.to(tl.int64)
    if PACKED:
        start = tl.load(packing.starts + sequence).to(tl.int64)
        length = tl.load(packing.starts + sequence + 1).to(tl.int64) - start
        return Place(sequence, sequence * 0, start, length.to(tl.int32), start)
    else:
        return Place(sequence, sequence, sequence * 0, sizes.T, sequence * sizes.T)


@triton.jit
def owner(slot, owners, sizes, SPAN: tl.constexpr, PACKED: tl.constexpr):
    """The sequence that a slot of SPAN tokens belongs to."""
    if PACKED:
        return tl.load(owners + slot)
    else:
        return slot // tl.cdiv(sizes.T, SPAN)


@triton.jit
def first_slot(at, sizes, SPAN: tl.constexpr, PACKED: tl.constexpr):
    """The slot of the sequence's first SPAN tokens, as shapes.py numbers those of the states."""
    if PACKED:
        return at.start // SPAN + at.sequence
    else:
        return at.sequence * tl.cdiv(sizes.T, SPAN)


class Tile(NamedTuple):
    """A program's tile: its sequence, its number there, where the sequence's scratch begins, and
    the slot of its interval."""

    at: Any
    own: Any
    tokens: Any
    tiles: Any
    interval: Any


@triton.jit
def locate(packing, sizes, TILE: tl.constexpr, PACKED: tl.constexpr):
    at = place(owner(tl.program_id(0), packing.tiles, sizes, TILE, PACKED), packing, sizes, PACKED)
    head = tl.program_id(1).to(tl.int64)
    slot = first_slot(at, sizes, TILE, PACKED)
    own = (tl.program_id(0) - slot).to(tl.int32)
    interval = first_slot(at, sizes, INTERVAL, PACKED) + own // (INTERVAL // TILE)
    tokens = head * sizes.BT + at.token
    return Tile(at, own, tokens, head * sizes.slots + slot, interval)


@triton.jit
def tile_places(x, at, head, tile, d, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Addresses and mask of a tile's tokens and columns `d` of x. The offsets within a tile fit 32
    bits and are the same for all."""
    first = x.ptr + at.batch * x.b + (at.start + tile * TILE) * x.t + head.to(tl.int64) * x.h
    r = tl.arange(0, TILE)
    mask = (r < at.length - tile * TILE)[:, None]
    if tl.constexpr(WIDTH) % d.shape[0] != 0:
        mask = mask & (d < WIDTH)[None, :]
    return first + (r[:, None] * x.t + d[None, :]), mask


@triton.jit
def load_tile(x, at, head, tile, d, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Zero beyond the sequence's end and the tensor's width."""
    places, mask = tile_places(x, at, head, tile, d, WIDTH, TILE)
    return tl.load(places, mask, other=0.0)


@triton.jit
def store_tile(x, at, head, tile, d, values, WIDTH: tl.constexpr, TILE: tl.constexpr):
    places, mask = tile_places(x, at, head, tile, d, WIDTH, TILE)
    tl.store(places, values.to(x.ptr.dtype.element_ty), mask)


@triton.jit
def store_sum(to, x):
    """The sum of a vector, taken as a matrix's: of a vector's that comes from a product, Triton 3.7
    for sm_100 stumbles over the layout."""
    tl.store(to + tl.arange(0, 1), tl.sum(x[None, :], 1))


@triton.jit
def block_of(row, head, H, k, v, K: tl.constexpr, V: tl.constexpr):
    """Offsets and mask of rows `k` and columns `v` of c, and of `k` of n."""
    n = (row * H + head) * K + k
    return n[:, None] * V + v[None, :], (k < K)[:, None] & (v < V)[None, :], n, k < K


@triton.jit
def load_block(state, row, head, H, k, v, K: tl.constexpr, V: tl.constexpr):
    c_at, c_mask, n_at, n_mask = block_of(row, head, H, k, v, K, V)
    c = tl.load(state.c + c_at, c_mask, other=0.0)
    return c, tl.load(state.n + n_at, n_mask, other=0.0)


@triton.jit
def store_block(state, row, head, H, k, v, c, n, K: tl.constexpr, V: tl.constexpr):
    """c, and n from the programs of the first values."""
    c_at, c_mask, n_at, n_mask = block_of(row, head, H, k, v, K, V)
    tl.store(state.c + c_at, c, c_mask)
    tl.store(state.n + n_at, n, n_mask & (tl.min(v, 0) == 0))


@triton.jit
def indices(block, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    k = block // tl.cdiv(V, BLOCK_V) * BLOCK_K + tl.arange(0, BLOCK_K)
    return k, block % tl.cdiv(V, BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)


@triton.jit
def product(
    a,
    b,
    x,
    y,
    at,
    head,
    tile_x,
    tile_y,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """x y^T of two tiles of tokens; `a` and `b` are they where one block is all."""
    if WIDTH <= BLOCK:
        return dot(a, tl.trans(b), DOT)
    else:
        sums = tl.zeros((TILE, TILE), tl.float32)
        for first in tl.range(0, WIDTH, BLOCK):
            d = first + tl.arange(0, BLOCK)
            x_tile = load_tile(x, at, head, tile_x, d, WIDTH, TILE)
            y_tile = load_tile(y, at, head, tile_y, d, WIDTH, TILE)
            sums += dot(x_tile, tl.trans(y_tile), DOT)
        return sums


@triton.jit
def load_gate(ptr, b, s, h, at, head, t, end):
    offset = at.batch * b + (at.start + t) * s + head.to(tl.int64) * h
    return tl.load(ptr + offset, t < end, other=0.0).to(tl.float32)


@triton.jit
def load_log_f(gates, at, head, t, end):
    """lf of tokens `t`, 0 from `end` on."""
    f = load_gate(gates.f, gates.fb, gates.ft, gates.fh, at, head, t, end)
    return tl.where(t < end, log_sigmoid(f), 0.0)


@triton.jit
def load_log_i(gates, at, head, t, end, INPUT_GATE: tl.constexpr):
    """li of tokens `t`, -inf from `end` on: they weigh nothing."""
    i = load_gate(gates.i, gates.ib, gates.it, gates.ih, at, head, t, end)
    if INPUT_GATE == "sigmoid":
        i = log_sigmoid(i)
    return tl.where(t < end, i, float("-inf"))


@triton.jit
def load_key_log(gates, at, head, t, t_end, INPUT_GATE: tl.constexpr):
    """key_log of the tile that ends before token t_end."""
    end = tl.minimum(at.length, t_end)
    after = load_log_f(gates, at, head, t + 1, end)
    return load_log_i(gates, at, head, t, at.length, INPUT_GATE) + tl.cumsum(after, 0, reverse=True)


@triton.jit
def own_logs(lf, li, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Logarithm of the weight that each token has at each token of its own tile, without m: later
    tokens are along AXIS."""
    r = tl.arange(0, TILE)
    if AXIS == 0:
        later, lf, li = r[:, None] - r[None, :], lf[:, None], li[None, :]
    else:
        later, lf, li = r[None, :] - r[:, None], lf[None, :], li[:, None]
    logs = tl.cumsum(tl.where(later > 0, lf, 0.0), AXIS) + li
    return tl.where(later >= 0, logs, float("-inf"))


@triton.jit
def finite_base(m):
    """As in cells/mlstm.py, but far down where that has 0: one instruction, and fewer registers.
    What exponents less it are there is -inf."""
    return tl.maximum(m, -3.0e38)


@triton.jit
def row_scale(den, m, eps, NORMALIZER: tl.constexpr):
    """What a row's sums are multiplied by to give h; what <dh, h> is, to give dden and dm."""
    if NORMALIZER == "none":
        return tl.exp(m), den * 0.0, den * 0.0
    elif NORMALIZER == "plain":
        inverse = 1.0 / (den + eps)
        return inverse, -inverse, -eps * inverse
    else:
        bound = tl.exp(tl.minimum(-m, EXPONENT_LIMIT))
        bounded = tl.abs(den) <= bound
        inverse = 1.0 / (tl.where(bounded, bound, tl.abs(den)) + eps)
        dden = tl.where(bounded, 0.0, tl.where(den > 0, -inverse, inverse))
        saturated = bounded & (-m > EXPONENT_LIMIT)
        return inverse, dden, tl.where(saturated, -1.0, -eps * inverse)
