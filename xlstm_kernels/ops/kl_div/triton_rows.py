"""What Triton kernels of losses over rows of student logits share: where a program's rows are,
their logits, and the hard-label part.

Of a row's logits z, at temperature 1, with L = ln sum exp(z):
  CE = L - (1 - s) z_label - s mean z + zeta L^2       mean over what is not masked
  dCE/dz = (1 + 2 zeta L) softmax(z) - (1 - s) onehot - s / words
With a softcap these z, and the divergence's, are c tanh(x / c), and dz/dx = 1 - (z / c)^2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...cells.triton_math import narrowed
from .triton_math import ln, sum_lanes, tanh

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


class How(NamedTuple):
    """What a kernel is compiled for: the compute dtype; rows of a program, and columns it takes at
    once; what it computes, and which of its arguments there are."""

    dtype: Any
    rows: int
    block: int
    divergence: str
    grad: bool
    labelled: bool
    weighted: bool
    capped: bool
    teacher_capped: bool
    hard: bool  # the hard-label part counts
    own: bool  # its softmax is not the divergence's
    smooth: bool
    emulated: bool  # by Triton's interpreter
    phase: str  # "whole", or what it does of rows that are split: "sums", "mixed", "loss"


class Logits(NamedTuple):
    """V columns side by side, and two strides that lead from row to row."""

    ptr: Any
    V: Any
    outer: Any
    inner: Any


class Given(NamedTuple):
    """labels (N,) int64; row_weight (N,) and the reduction's factor, (), in the compute dtype."""

    labels: Any
    row_weight: Any
    factor: Any


class Factors(NamedTuple):
    """log2(e) / T, 1 / T, and kl_weight times T^2 and T."""

    scale: Any
    inverse_T: Any
    loss: Any
    grad: Any


class Rows(NamedTuple):
    """A program's rows: their numbers, whether they are there, and whether they count, by label and
    weight; weight, and weight times the reduction's factor, NaN where the label is out of range;
    label, negative where another process has it. Each [rows]."""

    n: Any
    there: Any
    live: Any
    weight: Any
    scale: Any
    label: Any


@triton.jit
def number(x, HOW: tl.constexpr):
    """A kernel's number in the compute dtype."""
    return tl.full([], x, HOW.dtype)


@triton.jit
def rows_of(given, V, N, ignore_index, HOW: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * HOW.rows + tl.arange(0, HOW.rows)
    there = n < N
    live = there
    weight = tl.full([HOW.rows], 1.0, HOW.dtype)
    label = tl.full([HOW.rows], 0, tl.int64)
    if HOW.weighted:
        weight = tl.load(given.row_weight + n, there, other=0.0)
        live = live & (weight != 0.0)
    if HOW.labelled:
        label = tl.load(given.labels + n, there, other=0)
        live = live & (label != ignore_index)
        known = (label >= 0) & (label < V)
        if HOW.phase != "whole":
            known = known | (label < 0)  # among another process's columns
        weight = tl.where(known, weight, float("nan"))
        label = tl.where(known, label, 0)
    return Rows(n, there, live, weight, weight * tl.load(given.factor), label)


@triton.jit
def weighed_wrong(rows):
    """By what is no finite number, or with a label out of range."""
    return (tl.abs(rows.scale) < INFINITY) == 0


@triton.jit
def first_of(x, n, inner_rows):
    """Addresses of the rows' first elements."""
    return x.ptr + (n // inner_rows) * x.outer + (n % inner_rows) * x.inner


@triton.jit
def softcapped(z, cap, CAPPED: tl.constexpr):
    """A masked logit stays masked."""
    if CAPPED:
        z = tl.where(z == -INFINITY, z, cap * tanh(z / cap))
    return z


@triton.jit
def load_logits(
    first, live, col, V, cap, CAPPED: tl.constexpr, POLICY: tl.constexpr, HOW: tl.constexpr
):
    """[rows, block], -inf where there are none."""
    mask = live[:, None] & (col < V)[None, :]
    z = tl.load(first[:, None] + col[None, :], mask, other=-INFINITY, eviction_policy=POLICY)
    return softcapped(z.to(HOW.dtype), cap, CAPPED)


@triton.jit
def load_one(first, place, mask, cap, HOW: tl.constexpr):
    """The student's logits at single places, of the shape of `first`, -inf where not in mask."""
    z = tl.load(first + place, mask, other=-INFINITY).to(HOW.dtype)
    return softcapped(z, cap, HOW.capped)


@triton.jit
def store_gradient(first, rows, col, V, g, HOW: tl.constexpr):
    """Of all rows that are there: those that do not count have zeros."""
    mask = rows.there[:, None] & (col < V)[None, :]
    g = tl.where(rows.live[:, None], g, 0.0)
    g = in_dtype_of(first, g, HOW)
    tl.store(first[:, None] + col[None, :], g, mask, eviction_policy="evict_first")


@triton.jit
def in_dtype_of(first, g, HOW: tl.constexpr):
    return narrowed(g, first.dtype.element_ty, HOW.emulated and g.dtype == tl.float32)


@triton.jit
def finite(most):
    """What a row's logits are compared with: 0 where all are masked."""
    return tl.where(most == -INFINITY, 0.0, most)


@triton.jit
def grown(most, z):
    """The larger of `most` and the largest of z, and by how much that is more."""
    larger = tl.maximum(most, tl.max(z, 1))
    return larger, finite(larger) - finite(most)


class Hard(NamedTuple):
    """A logit near the largest so far, and relative to it sums of exp(z), where that is not the
    divergence's, and of z, and how many are not masked; in lanes [rows, block], at the end [rows].
    """

    most: Any
    sum: Any
    total: Any
    words: Any


@triton.jit
def add_hard(hard, z, most, lift, HOW: tl.constexpr):
    """`most` and `lift` are what grown() says of z."""
    x = z - finite(most)[:, None]
    sum = hard.sum
    total = hard.total
    words = hard.words
    if HOW.own:
        sum = sum * tl.exp2((hard.most - finite(most)) * LOG2_E)[:, None] + tl.exp2(x * LOG2_E)
    if HOW.smooth:
        here = z != -INFINITY
        total = total - lift[:, None] * words + tl.where(here, x, 0.0)
        words = words + tl.where(here, 1.0, 0.0)
    return Hard(most, sum, total, words)


@triton.jit
def over_lanes(hard):
    """In float64."""
    return Hard(hard.most, sum_lanes(hard.sum), sum_lanes(hard.total), sum_lanes(hard.words))


class HardNumbers(NamedTuple):
    """Numbers of the hard-label part, and the student's softcap."""

    weight: Any
    smoothing: Any
    z_loss: Any
    cap: Any


class Label(NamedTuple):
    """Of each row: the hard-label part of the loss, in float64; what its gradient is, by
    exp(z - most); and what comes off that of the label and of every word."""

    loss: Any
    most: Any
    soft: Any
    label_share: Any
    word_share: Any


@triton.jit
def hard_label(hard, z_label, rows, by, HOW: tl.constexpr):
    """`hard.sum` is that of exp(z - hard.most) whatever the temperature; all are rows' by now."""
    zero = rows.scale * 0.0
    most = finite(hard.most)
    label = Label(zero, most, zero, zero, zero)
    if HOW.hard:
        log_sum = ln(hard.sum)
        L = log_sum + most
        # From differences, which are small where logits are large.
        loss = log_sum - (z_label - most) + by.z_loss * L * L
        scale = rows.scale * by.weight
        share = zero
        if HOW.smooth:
            loss += by.smoothing * ((z_label - most) - hard.total / hard.words)
            share = scale * by.smoothing / hard.words.to(HOW.dtype)
        soft = scale * ((1.0 + 2.0 * by.z_loss * L) / hard.sum).to(HOW.dtype)
        label = Label(by.weight * loss, most, soft, scale * (1.0 - by.smoothing), share)
    return label


@triton.jit
def settled(label, counts, rest):
    """Rows that do not count have `rest`, 0 or NaN, everywhere."""
    return Label(
        tl.where(counts, label.loss, rest),
        tl.where(counts, label.most, 0.0),
        tl.where(counts, label.soft, rest),
        tl.where(counts, label.label_share, rest),
        tl.where(counts, label.word_share, rest),
    )


@triton.jit
def finish_gradient(g, z, col, label, rows, by, rest, SOFTMAX: tl.constexpr, HOW: tl.constexpr):
    """What the hard label, its softmax where SOFTMAX, and the softcap make of the gradient of words
    `col`. `rest` [rows] is what masked words get."""
    if SOFTMAX:
        g += label.soft[:, None] * tl.exp2((z - label.most[:, None]) * LOG2_E)
    if HOW.hard:
        at_label = col == rows.label[:, None]
        g -= tl.where(at_label, label.label_share[:, None], 0.0)
    if HOW.smooth:
        g -= label.word_share[:, None]
    if HOW.capped:
        t = z / by.cap
        g *= 1.0 - t * t
    if HOW.smooth or HOW.capped:
        g = tl.where(z == -INFINITY, rest[:, None], g)
    return g


@triton.jit(do_not_specialize=["N", "inner_rows"])
def scale_kernel(grad, factor, N, inner_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """grad *= factor (N,), in the dtype of factor; rows whose factor is 1 are not touched."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    by = tl.load(factor + n, n < N, other=1.0)
    first = first_of(grad, n, inner_rows)
    for begin in range(0, grad.V, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        places = first[:, None] + col[None, :]
        mask = (by != 1.0)[:, None] & (col < grad.V)[None, :]
        g = tl.load(places, mask, other=0.0).to(by.dtype) * by[:, None]
        tl.store(places, g.to(grad.ptr.dtype.element_ty), mask)
