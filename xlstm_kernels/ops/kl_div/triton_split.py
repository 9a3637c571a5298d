"""What Triton kernels tell of rows that are split over processes, and are told: the sums of their
own columns, and then those of the row (RowSums of csrc/launch.h, float64).

A shift is a largest logit in octaves, z log2(e) / T. With the scale as rounded in the exponents the
product has all its digits, and the quotient is the logit again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_rows import INFINITY, LOG2_E, Hard, finite

FIELDS = tl.constexpr(14)
SHIFT_S, SHIFT_T, SHIFT_HARD, STRAY = (tl.constexpr(field) for field in range(4))
SUM_S, SUM_T, EXCESS, GAP, SUM_HARD, Z_LABEL, Z_ALL, WORDS, MIXED, SLOPE = (
    tl.constexpr(field) for field in range(4, 14)
)


class Split(NamedTuple):
    """sums (N, FIELDS); z_words (N, K), the logits of a teacher's words, 0 where another process
    has them. Float64."""

    sums: Any
    z_words: Any


@triton.jit
def tell(split, rows, field: tl.constexpr, x):
    tl.store(split.sums + rows.n * FIELDS + field, x.to(tl.float64), rows.live)


@triton.jit
def told(split, rows, field: tl.constexpr):
    return tl.load(split.sums + rows.n * FIELDS + field, rows.live, other=0.0)


@triton.jit
def tell_shift(split, rows, field: tl.constexpr, most, scale):
    octaves = most.to(tl.float64) * scale.to(tl.float64)
    tell(split, rows, field, tl.where(most == -INFINITY, -INFINITY, octaves))


@triton.jit
def told_shift(split, rows, field: tl.constexpr, scale, HOW: tl.constexpr):
    octaves = told(split, rows, field)
    return tl.where(octaves == -INFINITY, octaves, octaves / scale.to(tl.float64)).to(HOW.dtype)


@triton.jit
def tell_hard(split, rows, hard, z_label, HOW: tl.constexpr):
    """hard: over all lanes, in float64."""
    if HOW.hard:
        tell(split, rows, Z_LABEL, tl.where(rows.label < 0, 0.0, z_label))
    if HOW.own:
        tell_shift(split, rows, SHIFT_HARD, hard.most, octave(HOW))
        tell(split, rows, SUM_HARD, hard.sum)
    if HOW.smooth:
        tell(split, rows, Z_ALL, hard.total + hard.words * finite(hard.most))
        tell(split, rows, WORDS, hard.words)


@triton.jit
def told_hard(split, rows, most, HOW: tl.constexpr):
    """And the label's logit. `most` is the row's largest."""
    zero = tl.full([HOW.rows], 0, tl.float64)
    hard = Hard(most, zero, zero, zero)
    z_label = most
    if HOW.own:
        most = told_shift(split, rows, SHIFT_HARD, octave(HOW), HOW)
        hard = Hard(most, told(split, rows, SUM_HARD), zero, zero)
    if HOW.smooth:
        words = told(split, rows, WORDS)
        total = told(split, rows, Z_ALL) - words * finite(most)
        hard = Hard(most, hard.sum, total, words)
    if HOW.hard:
        z_label = told(split, rows, Z_LABEL).to(HOW.dtype)
    return hard, z_label


@triton.jit
def octave(HOW: tl.constexpr):
    """log2(e) as the exponents of the hard-label part have it."""
    return tl.full([], LOG2_E, HOW.dtype)
