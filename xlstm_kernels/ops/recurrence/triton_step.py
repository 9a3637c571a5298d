"""One step of the recurrence in Triton, as a decoder takes: no loop, so nothing of R is kept.

  raw = x + R h + b        state' = step(raw, state)
Source: arXiv 2405.04517, section 2.2; cells/triton_cells.py.
Tensors: those of triton_forward.py, T = 1; R as it is, and heads of any width.
Programs: BLOCK_D units of a head, for ROWS sequences; each reads its rows of R once, DEPTH columns
at a time. Gates, sums and states float32. Saved: what the loop saves.
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
    state_places,
    store_states,
    token_places,
    where_runs,
)


@triton.jit(do_not_specialize=["B", "T", "n_floor"])
def step_kernel(
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
    first = tl.program_id(1) * BLOCK_D
    unit, d = first + unit, first + tl.arange(0, BLOCK_D)
    inside, runs = (at.sequence < sizes.B)[:, None], (at.length > 0)[:, None]
    here = inside & (d < D)[None, :]
    in_gates = runs & (unit < D)[None, :]
    raw_t = tl.load(token_places(x, at, 0, g.to(tl.int64) * x.g + unit), in_gates, other=0.0)
    raw_t = raw_t.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(b + (g * sizes.H + at.head) * D + unit, unit < D, other=0.0)
        raw_t += bias[None, :]
    state = no_states(ROWS, BLOCK_D, STATES)
    if HAS_INITIAL:
        state = load_states(initial, at.sequence, at, d, here, STATES, D)
        sums = tl.zeros((ROWS, 4 * BLOCK_D), tl.float32)
        for begin in tl.range(0, D, DEPTH, num_stages=AHEAD):
            e = begin + tl.arange(0, DEPTH)
            h_part = tl.load(
                state_places(initial, at.sequence, at, 0, e, D),
                inside & (e < D)[None, :],
                other=0.0,
            )
            part = load_r(r, at, sizes, g[None, :], unit[None, :], e[:, None], D)
            sums += product(h_part, r_parts(part, DOT), ROWS, DOT)
        raw_t = sums + raw_t
    if SAVE:
        tl.store(token_places(raw, at, 0, g * raw.g + unit), raw_t, in_gates)
        store_states(checkpoints, at.checkpoint, at, d, state, runs & here, STATES, D)
    after = STEP(split_gates(raw_t), state, n_floor)
    h_t = narrowed(after[0], h.ptr.dtype.element_ty, EMULATED)
    tl.store(token_places(h, at, 0, d), h_t, runs & (d < D)[None, :])
    state = where_runs(runs, after, state, STATES)
    store_states(last, at.sequence, at, d, state, here, STATES, D)
