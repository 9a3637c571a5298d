"""What the recurrence's Triton kernels share: where a program stands, gates side by side, and the
recurrent product.

A program runs one head of ROWS sequences over all of time, so nothing is synchronised between
programs. The gates of a step are one tile (ROWS, 4 BLOCK_D), gate by gate, which is loaded, stored
and multiplied at once.

R is the right operand of products on matrix units, which read 16-bit numbers, or 11 bits of
float32. The left one, h or the gates' gradients, is therefore a sum of two parts, which stand as
rows of one operand: ROWS = 8 sequences fill the 16 rows that a product has. By DOT:
  "bf16"    R is bfloat16, and so are the parts: 16 bits.
  "tf32"    R has at most 11 bits, and so have the parts: 22 bits.
  "tf32x2"  R is a sum of two such parts as well: float32's accuracy.
  "ieee"    no parts, sums of float32: where matrix units have those.
"bf16_emulated" is "bf16" in the interpreter, whose own product of bfloat16 is wrong. EMULATED is
true there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_math import narrowed


class Rows(NamedTuple):
    """A (B, T, ..., H, D) tensor with neighbours in D side by side; its other strides, that of the
    gates among them."""

    ptr: Any
    b: Any
    t: Any
    g: Any
    h: Any


class States(NamedTuple):
    """The states in rows of (H, D), and the strides of rows and of states."""

    ptr: Any
    row: Any
    state: Any


class Sizes(NamedTuple):
    """Lengths that vary from call to call; B counts sequences. Kernels take them apart: within a
    tuple Triton specialises on each, whatever `do_not_specialize` says."""

    B: Any
    T: Any
    H: Any


class Place(NamedTuple):
    """A program's head and sequences: each one's number, its row of a (B, T) tensor, where in it it
    starts, its first checkpoint, its length, and the longest."""

    head: Any
    sequence: Any
    batch: Any
    start: Any
    checkpoint: Any
    length: Any
    longest: Any


@triton.jit
def place(starts, sizes, ROWS: tl.constexpr, INTERVAL: tl.constexpr, PACKED: tl.constexpr):
    """Offsets out of order give nonsense, but stay inside: they are on the device, and looking at
    them first would stop it."""
    head = (tl.program_id(0) % sizes.H).to(tl.int64)
    sequence = (tl.program_id(0) // sizes.H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sequence < sizes.B
    if PACKED:
        start = tl.load(starts + sequence, inside, other=0)
        start = tl.minimum(tl.maximum(start, 0), sizes.T)
        end = tl.load(starts + sequence + 1, inside, other=0)
        length = tl.maximum(tl.minimum(end, sizes.T) - start, 0)
        batch, start = sequence * 0, start.to(tl.int64)
        checkpoint = start // INTERVAL + sequence
    else:
        length = tl.where(inside, sizes.T, 0)
        batch, start = sequence, sequence * 0
        checkpoint = sequence * tl.cdiv(sizes.T, INTERVAL)
    return Place(head, sequence, batch, start, checkpoint, length, tl.max(length, 0))


@triton.jit
def gate_columns(BLOCK_D: tl.constexpr):
    """The gate and the unit of each column of a tile of gates."""
    k = tl.arange(0, 4 * BLOCK_D)
    return k // BLOCK_D, k % BLOCK_D


@triton.jit
def beside(a, b):
    """(ROWS, N) twice -> (ROWS, 2 N)"""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def halves(x):
    """(ROWS, 2 N) -> (ROWS, N) twice"""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def split_gates(x):
    """(ROWS, 4 BLOCK_D) -> (ROWS, BLOCK_D) of each gate"""
    first, second = halves(x)
    i, f = halves(first)
    z, o = halves(second)
    return i, f, z, o


@triton.jit
def join_four(x):
    return beside(beside(x[0], x[1]), beside(x[2], x[3]))


@triton.jit
def token_places(x, at, t, columns):
    """Addresses of each sequence's token `t`."""
    first = at.batch * x.b + (at.start + t) * x.t + at.head * x.h
    return (x.ptr + first)[:, None] + columns[None, :]


@triton.jit
def state_places(x, row, at, s, d, D: tl.constexpr):
    first = row * x.row + s * x.state + at.head * D
    return x.ptr + (first[:, None] + d[None, :])


@triton.jit
def load_states(x, row, at, d, mask, STATES: tl.constexpr, D: tl.constexpr):
    states = ()
    for s in tl.static_range(STATES):
        states += (tl.load(state_places(x, row, at, s, d, D), mask, other=0.0),)
    return states


@triton.jit
def store_states(x, row, at, d, states, mask, STATES: tl.constexpr, D: tl.constexpr):
    for s in tl.static_range(STATES):
        tl.store(state_places(x, row, at, s, d, D), states[s], mask)


@triton.jit
def no_states(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STATES: tl.constexpr):
    states = ()
    for _ in tl.static_range(STATES):
        states += (tl.zeros((ROWS, BLOCK_D), tl.float32),)
    return states


@triton.jit
def with_h(states, h, STATES: tl.constexpr):
    """The states, but for h."""
    changed = (h,)
    for s in tl.static_range(1, STATES):
        changed += (states[s],)
    return changed


@triton.jit
def where_runs(runs, after, before, STATES: tl.constexpr):
    """A sequence that has ended keeps its states."""
    states = ()
    for s in tl.static_range(STATES):
        states += (tl.where(runs, after[s], before[s]),)
    return states


@triton.jit
def load_r(r, at, sizes, g, d, e, D: tl.constexpr):
    """R from units `e` to gates `g` of units `d`, zero beyond them; `e` broadcasts with the two."""
    return tl.load(r + ((g * sizes.H + at.head) * D + d) * D + e, (d < D) & (e < D), other=0.0)


@triton.jit
def high_part(x):
    """x to 11 bits, rounded."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def r_parts(r, DOT: tl.constexpr):
    """What `product` takes: R's first part, and the rest with "tf32x2"."""
    if DOT == "bf16":
        return r, r
    elif DOT == "tf32x2":
        high = high_part(r.to(tl.float32))
        return high, r.to(tl.float32) - high
    else:
        return r.to(tl.float32), r.to(tl.float32)


@triton.jit
def x_parts(x, DOT: tl.constexpr):
    if DOT == "bf16":
        high = x.to(tl.bfloat16)
        return high, (x - high.to(tl.float32)).to(tl.bfloat16)
    elif DOT == "bf16_emulated":
        high = narrowed(x, tl.bfloat16, True).to(tl.float32)
        return high, narrowed(x - high, tl.bfloat16, True).to(tl.float32)
    else:
        high = high_part(x)
        return high, x - high


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    if DOT == "bf16":
        return tl.dot(a, b)
    elif DOT == "bf16_emulated" or DOT == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def part_products(parts, r, ROWS: tl.constexpr, DOT: tl.constexpr):
    """The products of the first parts and of the second."""
    sums = tl.reshape(dot(parts, r, DOT), (2, ROWS, r.shape[1]))
    return tl.split(tl.permute(sums, (1, 2, 0)))


@triton.jit
def product(x, r, ROWS: tl.constexpr, DOT: tl.constexpr):
    """x R of x (ROWS, K); the small products are added first."""
    if DOT == "ieee":
        return dot(x, r[0], DOT)
    else:
        high, low = x_parts(x, DOT)
        parts = tl.permute(tl.join(high, low), (2, 0, 1))
        parts = tl.reshape(parts, (2 * ROWS, x.shape[1]))
        large, small = part_products(parts, r[0], ROWS, DOT)
        if DOT == "tf32x2":
            high, low = part_products(parts, r[1], ROWS, DOT)
            small += high + low
        return large + small


@triton.jit
def streamed(
    x,
    r,
    at,
    sizes,
    BACKWARD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """x R, R read for this product alone: DEPTH of its rows at a time."""
    column = tl.arange(0, BLOCK_D)
    if not BACKWARD:
        column = tl.arange(0, 4 * BLOCK_D)
    sums = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for first in tl.range(0, x.shape[1], DEPTH, num_stages=2):
        k = first + tl.arange(0, DEPTH)
        if BACKWARD:
            g, d, e = (k // BLOCK_D)[:, None], (k % BLOCK_D)[:, None], column[None, :]
        else:
            g, d, e = (column // BLOCK_D)[None, :], (column % BLOCK_D)[None, :], k[:, None]
        part = load_r(r, at, sizes, g, d, e, D)
        x_part = tl.gather(x, tl.broadcast_to(k[None, :], (ROWS, DEPTH)), 1)
        sums += product(x_part, r_parts(part, DOT), ROWS, DOT)
    return sums
