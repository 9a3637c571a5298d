"""Divergence of a student's softmax from a teacher's, mixed with hard-label cross-entropy: the loss
of every row and its gradient by the student's logits, in Triton.
  x = z - max z      e = 2^(x log2(e) / T)      S = sum e      p = e_t / S_t      q = e_s / S_s
  forward  KL(p|q) = sum p (x_t - x_s) / T + ln(S_s / S_t)     dKL/dz_s = (q - p) / T
  reverse  KL(q|p) = sum q gap + ln(S_t / S_s)                 dKL/dz_s = q (gap - sum q gap) / T
                     gap = (x_s - x_t) / T
  the others: triton_mixture.py                                D' = (q h - q sum q h) / T
  loss = kl_weight T^2 D + ce_weight CE          CE: triton_rows.py
Source: Hinton et al., arXiv 1503.02531 (T^2). S_s - S_t has a sum of its own, excess, so that loss
and gradient are exact to the order of q - p.
Tensors: triton_rows.py. Grid: some rows a program, in blocks of columns. One sweep sums, relative
to the largest logit so far (triton_rescale.py); mixtures have a second one; the last writes the
gradient. Sums stay in lanes, in the compute dtype, and meet once a row, in float64. Each sweep goes
the other way, so that it begins with what the one before has left in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_math import log_of_ratio, sum_lanes
from .triton_mixture import mixture, terms
from .triton_rescale import Scale, difference, no_top, rescaled, risen
from .triton_rows import (
    INFINITY,
    Factors,
    Hard,
    HardNumbers,
    add_hard,
    finish_gradient,
    finite,
    first_of,
    hard_label,
    load_logits,
    load_one,
    number,
    over_lanes,
    rows_of,
    settled,
    store_gradient,
    weighed_wrong,
)
from .triton_split import (
    EXCESS,
    GAP,
    MIXED,
    SHIFT_S,
    SHIFT_T,
    SLOPE,
    STRAY,
    SUM_S,
    SUM_T,
    tell,
    tell_hard,
    tell_shift,
    told,
    told_hard,
    told_shift,
)

LN_2 = tl.constexpr(0.6931471805599453)


class Pair(NamedTuple):
    """Student and teacher: addresses of the program's rows, widths, softcaps."""

    s: Any
    t: Any
    V_s: Any
    V_t: Any
    cap_s: Any
    cap_t: Any


class Sums(NamedTuple):
    """Over the columns so far, relative to the largest logits: in lanes [rows, block], at the end
    [rows] in float64. gap: of e_t (x_t - x_s), reverse: of e_s (x_s - x_t). stray: the largest
    logit of the first distribution where the second is masked."""

    most_s: Any
    most_t: Any
    sum_s: Any
    sum_t: Any
    excess: Any
    gap: Any
    stray: Any


class Weights(NamedTuple):
    """How a row's e become its q and p; apart: s - t, exact where the two are nearly equal."""

    s: Any
    t: Any
    apart: Any


@triton.jit
def load_pair(pair, rows, col, POLICY: tl.constexpr, HOW: tl.constexpr):
    z_s = load_logits(pair.s, rows.live, col, pair.V_s, pair.cap_s, HOW.capped, POLICY, HOW)
    z_t = load_logits(pair.t, rows.live, col, pair.V_t, pair.cap_t, HOW.teacher_capped, POLICY, HOW)
    return z_s, z_t


@triton.jit
def relative(z_s, z_t, most_s, most_t, scale):
    """e_s, e_t, and x_s - x_t, 0 where one of them is masked."""
    x_s = z_s - finite(most_s)[:, None]
    x_t = z_t - finite(most_t)[:, None]
    apart = tl.where((x_s == -INFINITY) | (x_t == -INFINITY), 0.0, x_s - x_t)
    return tl.exp2(x_s * scale), tl.exp2(x_t * scale), apart


@triton.jit
def add_block(sums, z_s, z_t, s, t, scale, HOW: tl.constexpr):
    """s and t are the tops that z has raised."""
    e_s, e_t, apart = relative(z_s, z_t, s.most, t.most, scale)
    lift = (s.lift - t.lift)[:, None]
    stray = sums.stray
    if HOW.divergence == "reverse":
        kept = rescaled(sums.gap - lift * sums.sum_s, s)
        gap = tl.where((s.power > 0.0)[:, None], kept, 0.0) + e_s * apart
        stray = tl.maximum(stray, tl.where(z_t == -INFINITY, z_s, -INFINITY))
    else:
        kept = rescaled(sums.gap + lift * sums.sum_t, t)
        gap = tl.where((t.power > 0.0)[:, None], kept, 0.0) - e_t * apart
    if HOW.divergence == "forward":
        stray = tl.maximum(stray, tl.where(z_s == -INFINITY, z_t, -INFINITY))
    kept = rescaled(sums.excess, s) + difference(s, t)[:, None] * sums.sum_t
    sum_s = rescaled(sums.sum_s, s) + e_s
    sum_t = rescaled(sums.sum_t, t) + e_t
    return Sums(s.most, t.most, sum_s, sum_t, kept + (e_s - e_t), gap, stray)


@triton.jit
def read(pair, rows, scale, HOW: tl.constexpr):
    """The rows' sums over all columns: of the divergence, and of the hard-label part."""
    none = tl.full([HOW.rows], -INFINITY, HOW.dtype)
    zero = tl.full([HOW.rows, HOW.block], 0, HOW.dtype)
    sums = Sums(none, none, zero, zero, zero, zero, zero - INFINITY)
    s = no_top(none)
    t = no_top(none)
    hard = Hard(none, zero, zero, zero)
    for begin in range(0, tl.maximum(pair.V_s, pair.V_t), HOW.block):
        col = begin + tl.arange(0, HOW.block)
        z_s, z_t = load_pair(pair, rows, col, "evict_last", HOW)
        s = risen(s, z_s, scale)
        t = risen(t, z_t, scale)
        hard = add_hard(hard, z_s, s.most, s.lift, HOW)
        sums = add_block(sums, z_s, z_t, s, t, scale.all, HOW)
    return (
        Sums(
            sums.most_s,
            sums.most_t,
            sum_lanes(sums.sum_s),
            sum_lanes(sums.sum_t),
            sum_lanes(sums.excess),
            sum_lanes(sums.gap),
            tl.max(sums.stray, 1),
        ),
        over_lanes(hard),
    )


@triton.jit
def tell_sums(split, rows, sums, scale, HOW: tl.constexpr):
    tell_shift(split, rows, SHIFT_S, sums.most_s, scale)
    tell_shift(split, rows, SHIFT_T, sums.most_t, scale)
    tell_shift(split, rows, STRAY, sums.stray, scale)
    tell(split, rows, SUM_S, sums.sum_s)
    tell(split, rows, SUM_T, sums.sum_t)
    tell(split, rows, EXCESS, sums.excess)
    tell(split, rows, GAP, sums.gap * scale.to(tl.float64))


@triton.jit
def told_sums(split, rows, scale, HOW: tl.constexpr):
    return Sums(
        told_shift(split, rows, SHIFT_S, scale, HOW),
        told_shift(split, rows, SHIFT_T, scale, HOW),
        told(split, rows, SUM_S),
        told(split, rows, SUM_T),
        told(split, rows, EXCESS),
        told(split, rows, GAP) / scale.to(tl.float64),
        told_shift(split, rows, STRAY, scale, HOW),
    )


@triton.jit
def plain_divergence(sums, scale, HOW: tl.constexpr):
    """KL(q|p) for reverse, else KL(p|q), as if nothing were masked in one alone."""
    if HOW.divergence == "reverse":
        mean_gap = sums.gap / sums.sum_s
        more = -sums.excess / sums.sum_s
        ratio = sums.sum_t / sums.sum_s
    else:
        mean_gap = sums.gap / sums.sum_t
        more = sums.excess / sums.sum_t
        ratio = sums.sum_s / sums.sum_t
    log, _ = log_of_ratio(ratio, more)
    # T as rounded in the exponents: what was not would not cancel.
    kl = mean_gap * (scale.to(tl.float64) * LN_2) + log
    return tl.where(kl < 0.0, 0.0, kl)


@triton.jit
def infinite(sums, scale, HOW: tl.constexpr):
    """Whether the first distribution has mass, however little, where the second is masked."""
    most = sums.most_s if HOW.divergence == "reverse" else sums.most_t
    least = -1075.0 if HOW.dtype == tl.float64 else -150.0  # below 2^least there is no number
    return (sums.stray - finite(most)) * scale > least


@triton.jit
def mixed_terms(z_s, z_t, sums, weights, by, scale, HOW: tl.constexpr):
    e_s, e_t, _ = relative(z_s, z_t, sums.most_s, sums.most_t, scale)
    p = e_t * weights.t[:, None]
    q = e_s * weights.s[:, None]
    d = (e_t - e_s) * weights.t[:, None] - e_s * weights.apart[:, None]
    return terms(p, q, d, by, HOW)


@triton.jit
def mix(pair, rows, sums, weights, by, scale, HOW: tl.constexpr):
    """The rows' divergence, and sum q h."""
    losses = tl.full([HOW.rows, HOW.block], 0, HOW.dtype)
    slopes = tl.full([HOW.rows, HOW.block], 0, HOW.dtype)
    blocks = tl.cdiv(tl.maximum(pair.V_s, pair.V_t), HOW.block)
    for i in range(blocks):
        col = (blocks - 1 - i) * HOW.block + tl.arange(0, HOW.block)
        z_s, z_t = load_pair(pair, rows, col, "evict_last", HOW)
        loss, slope = mixed_terms(z_s, z_t, sums, weights, by, scale, HOW)
        losses += loss
        slopes += slope
    return sum_lanes(losses), sum_lanes(slopes)


@triton.jit
def block_gradient(z_s, z_t, sums, weights, by, scale, a, b, HOW: tl.constexpr):
    """All of it that a softmax at the divergence's temperature makes."""
    e_s, e_t, apart = relative(z_s, z_t, sums.most_s, sums.most_t, scale)
    if HOW.divergence == "forward":
        part = e_s - e_t  # exactly 0 where the two agree: then b is 0
    elif HOW.divergence == "reverse":
        part = e_s * apart
    else:
        _, part = mixed_terms(z_s, z_t, sums, weights, by, scale, HOW)
    return part * a[:, None] + e_s * b[:, None]


@triton.jit
def kl_div_row(pair, rows, split, hard_by, mix_p, z_label, factors, scale, HOW: tl.constexpr):
    """What the last sweep needs, and the rows' loss."""
    if HOW.phase == "whole":
        sums, hard = read(pair, rows, scale, HOW)
    else:
        sums = told_sums(split, rows, factors.scale, HOW)
        hard, z_label = told_hard(split, rows, sums.most_s, HOW)
    nan = (sums.sum_s != sums.sum_s) | (sums.sum_t != sums.sum_t) | weighed_wrong(rows)
    counts = (sums.sum_s > 0.0) & (sums.sum_t > 0.0) & (nan == 0)
    rest = tl.where(nan, float("nan"), 0.0).to(HOW.dtype)
    # From here on sums are positive: those of rows that do not count are not looked at.
    sum_s = tl.where(counts, sums.sum_s, 1.0)
    sum_t = tl.where(counts, sums.sum_t, 1.0)
    sums = Sums(sums.most_s, sums.most_t, sum_s, sum_t, sums.excess, sums.gap, sums.stray)
    D = plain_divergence(sums, factors.scale, HOW)
    mean_gap = (sums.gap / sum_s).to(HOW.dtype)
    apart = (-sums.excess / sum_t / sum_s).to(HOW.dtype)
    weights = Weights((1.0 / sum_s).to(HOW.dtype), (1.0 / sum_t).to(HOW.dtype), apart)
    if not HOW.own:
        hard = Hard(hard.most, sum_s, hard.total, hard.words)
    label = settled(hard_label(hard, z_label, rows, hard_by, HOW), counts, rest)
    kl = rows.scale * factors.grad
    by = mixture(mix_p, ((D < 1.0) == 0)[:, None])
    if HOW.divergence == "forward":
        a = kl * weights.t
        b = kl * weights.apart
    elif HOW.divergence == "reverse":
        a = kl * weights.s * factors.inverse_T
        b = -a * mean_gap
    else:
        if HOW.phase == "loss":
            D = told(split, rows, MIXED)
            slope = told(split, rows, SLOPE)
        else:
            D, slope = mix(pair, rows, sums, weights, by, factors.scale, HOW)
        if HOW.phase == "mixed":
            tell(split, rows, MIXED, D)
            tell(split, rows, SLOPE, slope)
        slope = slope.to(HOW.dtype)
        a = kl
        b = -kl * weights.s * slope
    if HOW.divergence == "forward" or HOW.divergence == "reverse":
        is_infinite = counts & infinite(sums, factors.scale, HOW)
        D = tl.where(is_infinite, INFINITY, D)
        if HOW.divergence == "reverse":  # no direction leads away from there
            nowhere = tl.where(is_infinite, tl.where(factors.loss == 0.0, 0.0, float("nan")), 0.0)
            rest += nowhere
            a += nowhere
    loss = tl.where(factors.loss == 0.0, 0.0, factors.loss * D) + label.loss
    loss = tl.where(counts, rows.weight * loss, rest).to(HOW.dtype)
    a = tl.where(counts, a, rest)
    b = tl.where(counts, b, rest)
    if HOW.hard and not HOW.own:
        b += label.soft
    return sums, weights, by, label, a, b, rest, loss


@triton.jit(do_not_specialize=["N", "inner_rows", "ignore_index"])
def kl_div_kernel(
    student,
    teacher,
    grad,
    given,
    split,
    row_loss,
    N,
    inner_rows,
    ignore_index,
    scale: tl.float64,
    inverse_T: tl.float64,
    loss_gain: tl.float64,
    grad_gain: tl.float64,
    mix_p: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    z_loss: tl.float64,
    cap: tl.float64,
    teacher_cap: tl.float64,
    coarse: tl.float64,
    HOW: tl.constexpr,
):
    """The gains are `Factors`' loss and grad; mix_p is how much of a mixture is p; coarse is the
    first 12 bits of scale."""
    rows = rows_of(given, student.V, N, ignore_index, HOW)
    s = first_of(student, rows.n, inner_rows)
    t = first_of(teacher, rows.n, inner_rows)
    pair = Pair(s, t, student.V, teacher.V, number(cap, HOW), number(teacher_cap, HOW))
    factors = Factors(
        number(scale, HOW), number(inverse_T, HOW), number(loss_gain, HOW), number(grad_gain, HOW)
    )
    first_bits = number(coarse, HOW)
    scales = Scale(factors.scale, first_bits, factors.scale - first_bits)
    hard_by = HardNumbers(
        number(ce_weight, HOW), number(smoothing, HOW), number(z_loss, HOW), pair.cap_s
    )
    # Before the gradient takes its place.
    z_label = load_one(s, rows.label, rows.live & (rows.label >= 0), pair.cap_s, HOW)
    if HOW.phase == "sums":
        sums, hard = read(pair, rows, scales, HOW)
        tell_sums(split, rows, sums, factors.scale, HOW)
        tell_hard(split, rows, hard, z_label, HOW)
    else:
        sums, weights, by, label, a, b, rest, loss = kl_div_row(
            pair, rows, split, hard_by, number(mix_p, HOW), z_label, factors, scales, HOW
        )
        tl.store(row_loss + rows.n, tl.where(rows.live, loss, 0.0), rows.there)
    if HOW.grad:
        tl.debug_barrier()  # all of the row has been read
        mixed: tl.constexpr = HOW.divergence != "forward" and HOW.divergence != "reverse"
        g_first = first_of(grad, rows.n, inner_rows)
        blocks = tl.cdiv(student.V, HOW.block)
        for i in range(blocks):
            begin = (i if mixed else blocks - 1 - i) * HOW.block
            col = begin + tl.arange(0, HOW.block)
            z_s, z_t = load_pair(pair, rows, col, "evict_first", HOW)
            g = block_gradient(z_s, z_t, sums, weights, by, factors.scale, a, b, HOW)
            g = finish_gradient(g, z_s, col[None, :], label, rows, hard_by, rest, HOW.own, HOW)
            store_gradient(g_first, rows, col, student.V, g, HOW)
