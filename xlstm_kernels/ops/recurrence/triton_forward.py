"""The recurrence over time in Triton, R on the chip where it fits.

  raw_t = x_t + R h_{t-1} + b        state_t = step(raw_t, state_{t-1})
Source: arXiv 2405.04517, section 2.2; cells/triton_cells.py.
Tensors: x (B, T, G, H, D), any strides but 1 in D; r, b, initial, last contiguous; shapes.py.
Programs: one head of ROWS sequences each. Gates, sums and states float32. Saved: raw, and the
states before every INTERVAL-th step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells.triton_math import narrowed
from .triton_tiles import (
    Sizes,
    gate_columns,
    load_r,
    load_states,
    no_states,
    place,
    product,
    r_parts,
    split_gates,
    store_states,
    streamed,
    token_places,
    where_runs,
)


@triton.jit(do_not_specialize=["B", "T", "n_floor"])
def forward_kernel(
    x,
    r,
    b,
    starts,
    initial,
    h,
    last,
    raw,
    checkpoints,
    B,
    T,
    H,
    n_floor,
    STEP: tl.constexpr,
    STATES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INTERVAL: tl.constexpr,
    DOT: tl.constexpr,
    HELD: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
    EMULATED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SAVE: tl.constexpr,
):
    sizes = Sizes(B, T, H)
    at = place(starts, sizes, ROWS, INTERVAL, PACKED)
    g, unit = gate_columns(BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    here = (at.sequence < sizes.B)[:, None] & (d < D)[None, :]
    if HELD:
        matrix = r_parts(load_r(r, at, sizes, g[None, :], unit[None, :], d[:, None], D), DOT)
    bias = tl.zeros((4 * BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(b + (g * sizes.H + at.head) * D + unit, unit < D, other=0.0)
    state = no_states(ROWS, BLOCK_D, STATES)
    if HAS_INITIAL:
        state = load_states(initial, at.sequence, at, d, here, STATES, D)
    for t in tl.range(0, at.longest, num_stages=AHEAD):
        runs = (t < at.length)[:, None]
        in_gates, in_state = runs & (unit < D)[None, :], runs & (d < D)[None, :]
        if not HELD:  # before x and places to store to, which would take registers all along
            sums = streamed(state[0], r, at, sizes, False, D, BLOCK_D, ROWS, DEPTH, DOT)
        x_t = tl.load(token_places(x, at, t, g.to(tl.int64) * x.g + unit), in_gates, other=0.0)
        if HELD:
            sums = product(state[0], matrix, ROWS, DOT)
        if SAVE and t % INTERVAL == 0:
            row = at.checkpoint + t // INTERVAL
            store_states(checkpoints, row, at, d, state, runs & here, STATES, D)
        raw_t = sums + (x_t.to(tl.float32) + bias[None, :])
        if SAVE:
            tl.store(token_places(raw, at, t, g * raw.g + unit), raw_t, in_gates)
        after = STEP(split_gates(raw_t), state, n_floor)
        h_t = narrowed(after[0], h.ptr.dtype.element_ty, EMULATED)
        tl.store(token_places(h, at, t, d), h_t, in_state)
        state = where_runs(runs, after, state, STATES)
    store_states(last, at.sequence, at, d, state, here, STATES, D)
