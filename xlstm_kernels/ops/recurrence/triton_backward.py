"""Gradient of the recurrence over time in Triton, R on the chip where it fits.

  draw = step_grad        dh_{t-1} += R^T draw        dR = sum_t draw h_{t-1}^T
Source: csrc/cells, where step_grad is derived from the forward equations.
Tensors: raw and checkpoints of shapes.py; dh (B, T, H, D), any strides but 1 in D; dx as raw.
Programs: one head of ROWS sequences each. Sums and states float32. States are recomputed from a
checkpoint every INTERVAL steps, without a matrix product, into scratch (programs, INTERVAL,
STATES - 1, ROWS, BLOCK_D). dR is left to a product over dx and h_prev, both written here; db is one
part for each program. Nothing is added in an order that depends on timing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_math import narrowed
from .triton_tiles import (
    Sizes,
    gate_columns,
    join_four,
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
    with_h,
)


class Saved(NamedTuple):
    """What forward saved: raw as `Rows`, and checkpoints as `States`."""

    raw: Any
    checkpoints: Any


class Grads(NamedTuple):
    """What backward writes: dx and h before each step as `Rows`, parts of db (programs / H, G, H,
    D), and the initial state's gradient as `States`."""

    x: Any
    h_prev: Any
    b: Any
    state: Any


@triton.jit
def slot_places(scratch, slot, s, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STATES: tl.constexpr):
    """Of state `s` before the step in `slot` of this program's scratch."""
    tile = (slot * (STATES - 1) + s - 1) * ROWS + tl.arange(0, ROWS)
    return scratch + tile[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def recompute(
    saved,
    grads,
    scratch,
    at,
    begin,
    stop,
    n_floor,
    STEP: tl.constexpr,
    STATES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INTERVAL: tl.constexpr,
    AHEAD: tl.constexpr,
    EMULATED: tl.constexpr,
    WANT_R: tl.constexpr,
):
    """The states before each step from `begin` to `stop`, from the checkpoint before `begin`: h to
    h_prev, the others to scratch."""
    g, unit = gate_columns(BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    row = at.checkpoint + begin // INTERVAL
    mask = (begin < at.length)[:, None] & inside
    state = load_states(saved.checkpoints, row, at, d, mask, STATES, D)
    for t in tl.range(begin, stop, num_stages=AHEAD):
        runs = (t < at.length)[:, None]
        if WANT_R:
            h_t = narrowed(state[0], grads.h_prev.ptr.dtype.element_ty, EMULATED)
            tl.store(token_places(grads.h_prev, at, t, d), h_t, runs & inside)
        for s in tl.static_range(1, STATES):
            tl.store(slot_places(scratch, t - begin, s, ROWS, BLOCK_D, STATES), state[s])
        from_ = token_places(saved.raw, at, t, g * saved.raw.g + unit)
        raw_t = tl.load(from_, runs & (unit < D)[None, :], other=0.0)
        state = STEP(split_gates(raw_t), state, n_floor)


@triton.jit(do_not_specialize=["B", "T", "n_floor", "bound"])
def backward_kernel(
    dh,
    dlast,
    r,
    saved,
    starts,
    grads,
    scratch,
    B,
    T,
    H,
    n_floor,
    bound,
    STEP: tl.constexpr,
    STEP_GRAD: tl.constexpr,
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
    HAS_DH: tl.constexpr,
    HAS_DLAST: tl.constexpr,
    WANT_R: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_STATE: tl.constexpr,
):
    sizes = Sizes(B, T, H)
    at = place(starts, sizes, ROWS, INTERVAL, PACKED)
    g, unit = gate_columns(BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    inside, gates_inside = (d < D)[None, :], (unit < D)[None, :]
    here = (at.sequence < sizes.B)[:, None] & inside
    if HELD:
        matrix = r_parts(load_r(r, at, sizes, g[:, None], unit[:, None], d[None, :], D), DOT)
    d_state = no_states(ROWS, BLOCK_D, STATES)
    if HAS_DLAST:
        d_state = load_states(dlast, at.sequence, at, d, here, STATES, D)
    db = tl.zeros((ROWS, 4 * BLOCK_D), tl.float32)
    program = tl.program_id(0).to(tl.int64)
    scratch += program * (INTERVAL * (STATES - 1) * ROWS * BLOCK_D)
    chunks = tl.cdiv(at.longest, INTERVAL)
    for chunk in tl.range(0, chunks):
        begin = (chunks - 1 - chunk) * INTERVAL
        stop = tl.minimum(begin + INTERVAL, at.longest)
        recompute(
            saved,
            grads,
            scratch,
            at,
            begin,
            stop,
            n_floor,
            STEP,
            STATES,
            D,
            BLOCK_D,
            ROWS,
            INTERVAL,
            AHEAD,
            EMULATED,
            WANT_R,
        )
        tl.debug_barrier()
        for back in tl.range(0, stop - begin, num_stages=AHEAD):
            t = stop - 1 - back
            runs = (t < at.length)[:, None]
            from_ = token_places(saved.raw, at, t, g * saved.raw.g + unit)
            raw_t = tl.load(from_, runs & gates_inside, other=0.0)
            before = (tl.zeros((ROWS, BLOCK_D), tl.float32),)  # a step reads h through R alone
            for s in tl.static_range(1, STATES):
                slot = slot_places(scratch, t - begin, s, ROWS, BLOCK_D, STATES)
                before += (tl.load(slot),)
            after = d_state
            if HAS_DH:
                dh_t = tl.load(token_places(dh, at, t, d), runs & inside, other=0.0)
                after = with_h(d_state, d_state[0] + dh_t.to(tl.float32), STATES)
            gates = split_gates(raw_t)
            draw, d_before = STEP_GRAD(gates, before, after, n_floor)
            draw = tl.where(runs, join_four(draw), 0.0)
            dx_t = narrowed(draw, grads.x.ptr.dtype.element_ty, EMULATED)
            to = token_places(grads.x, at, t, g * grads.x.g + unit)
            tl.store(to, dx_t, runs & gates_inside)
            if WANT_B:
                db += draw
            if HELD:
                dh_before = product(draw, matrix, ROWS, DOT)
            else:
                dh_before = streamed(draw, r, at, sizes, True, D, BLOCK_D, ROWS, DEPTH, DOT)
            dh_before = tl.where(dh_before > bound, bound, dh_before)
            dh_before = tl.where(dh_before < -bound, -bound, dh_before)
            d_before = with_h(d_before, dh_before, STATES)
            d_state = where_runs(runs, d_before, d_state, STATES)
        tl.debug_barrier()
    if WANT_STATE:
        store_states(grads.state, at.sequence, at, d, d_state, here, STATES, D)
    if WANT_B:
        to = grads.b + ((program // sizes.H * 4 + g) * sizes.H + at.head) * D + unit
        tl.store(to, tl.sum(db, 0), unit < D)
