"""Divergence of a student's softmax from a teacher that is known by K of its words, mixed with
hard-label cross-entropy: the loss of every row and its gradient by the student's logits, in Triton.
  inside: the words that came, their masses added up    outside: all the others, with the mass r
  D(p, q) over these outcomes, p and q: triton_words.py, slopes q h: kl_div/triton_mixture.py
  dD/dz = (slope - q sum slopes) / T inside; outside the same of that outcome, times a word's part
  supports without a tail leave A, or the student outside, out of it
Source: arXiv 2603.15590, Eq. 13; arXiv 2503.16870.
Tensors: triton_words.py, kl_div/triton_rows.py. Grid: some rows a program, in blocks of columns.
One sweep sums what is outside, by itself and never as a difference: a histogram of the ids tells
which columns of a block are inside. Another writes the gradient as if all were outside, and then
that of the words inside is written over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..kl_div.triton_math import ln, sum_lanes
from ..kl_div.triton_rows import (
    INFINITY,
    Factors,
    Hard,
    HardNumbers,
    add_hard,
    finish_gradient,
    finite,
    first_of,
    grown,
    hard_label,
    in_dtype_of,
    load_logits,
    load_one,
    number,
    over_lanes,
    rows_of,
    settled,
    store_gradient,
    weighed_wrong,
)
from ..kl_div.triton_split import (
    SHIFT_S,
    SUM_S,
    tell,
    tell_hard,
    tell_shift,
    told,
    told_hard,
    told_shift,
)
from .triton_words import Outcomes, divergence, gather, teacher_of


class Outside(NamedTuple):
    """The largest logit outside so far, and sum of exp(x / T) relative to it."""

    most: Any
    sum: Any


class Student(NamedTuple):
    """Of each row: the outcomes' q; what is outside; the largest logit of all, the sum of
    exp(x / T) relative to it, and which part of that is compared."""

    q: Any
    log_q: Any
    tail_q: Any
    tail_log_q: Any
    outside: Any
    most: Any
    sum: Any
    part: Any


@triton.jit
def is_inside(ids, held, begin, HOW: tl.constexpr):
    """[rows, block]: whether a column of the block that begins there is a word inside."""
    here = held & (ids >= begin) & (ids < begin + HOW.block)
    row = tl.arange(0, HOW.rows)[:, None]
    place = tl.where(here, row * HOW.block + (ids - begin).to(tl.int32), 0)
    size: tl.constexpr = HOW.rows * HOW.block
    found = tl.histogram(tl.ravel(place), size, tl.ravel(here))
    return tl.reshape(found, [HOW.rows, HOW.block]) > 0


@triton.jit
def read(s, V, cap, rows, inside, scale, HOW: tl.constexpr):
    """Sums over the columns outside, and those of the hard-label part over all."""
    none = tl.full([HOW.rows], -INFINITY, HOW.dtype)
    zero = tl.full([HOW.rows, HOW.block], 0, HOW.dtype)
    outside = Outside(none, zero)
    hard = Hard(none, zero, zero, zero)
    for begin in range(0, V, HOW.block):
        col = begin + tl.arange(0, HOW.block)
        z = load_logits(s, rows.live, col, V, cap, HOW.capped, "evict_last", HOW)
        if HOW.own or HOW.smooth:
            most, lift = grown(hard.most, z)
            hard = add_hard(hard, z, most, lift, HOW)
        z = tl.where(is_inside(inside.ids, inside.held, begin, HOW), -INFINITY, z)
        most, _ = grown(outside.most, z)
        kept = tl.exp2((outside.most - finite(most)) * scale)[:, None] * outside.sum
        outside = Outside(most, kept + tl.exp2((z - finite(most)[:, None]) * scale))
    return Outside(outside.most, sum_lanes(outside.sum).to(HOW.dtype)), over_lanes(hard)


@triton.jit
def tell_outside(split, rows, outside, inside, z, words, scale, TOPK: tl.constexpr):
    tell_shift(split, rows, SHIFT_S, outside.most, scale)
    tell(split, rows, SUM_S, outside.sum)
    tl.store(split.z_words + word_places(words, rows, TOPK), z.to(tl.float64), inside.held)


@triton.jit
def told_outside(split, rows, inside, words, scale, HOW: tl.constexpr, TOPK: tl.constexpr):
    """And the logits of the words inside."""
    places = word_places(words, rows, TOPK)
    z = tl.load(split.z_words + places, inside.first, other=-INFINITY).to(HOW.dtype)
    most = told_shift(split, rows, SHIFT_S, scale, HOW)
    return Outside(most, told(split, rows, SUM_S).to(HOW.dtype)), z


@triton.jit
def word_places(words, rows, TOPK: tl.constexpr):
    return rows.n[:, None] * words.K + tl.arange(0, TOPK.columns)[None, :]


@triton.jit
def student_of(outside, z, inside, factors, HOW: tl.constexpr, TOPK: tl.constexpr):
    most_in = tl.max(tl.where(inside.first, z, -INFINITY), 1)
    most = tl.maximum(outside.most, most_in)
    if TOPK.support != "both":
        most_in = most
    most_in = tl.where(most_in == -INFINITY, most, most_in)
    x = z - finite(most_in)[:, None]
    e = tl.where(inside.first, tl.exp2(x * factors.scale), 0.0)
    x_out = outside.most - finite(most)
    e_out = tl.where(outside.sum == 0.0, 0.0, outside.sum * tl.exp2(x_out * factors.scale))
    e_in = tl.sum(e, 1)
    sum = e_in + e_out
    compared = sum
    if TOPK.support == "both":  # what is inside may be far below the row's largest
        sum = e_in * tl.exp2((finite(most_in) - finite(most)) * factors.scale) + e_out
        compared = e_in
    whole = tl.where(compared > 0.0, compared, 1.0)
    log_whole = ln(whole)
    log_q = tl.where(inside.first, x * factors.inverse_T, -INFINITY) - log_whole[:, None]
    tail_q = e_out / whole
    tail_log_q = ln(outside.sum) + x_out * factors.inverse_T - log_whole
    if TOPK.support == "both":
        tail_q = tail_q * 0.0
        tail_log_q = tail_q - INFINITY
    part = compared / tl.where(sum > 0.0, sum, 1.0)
    return Student(e / whole[:, None], log_q, tail_q, tail_log_q, outside, most, sum, part)


class Gradient(NamedTuple):
    """Of each row: what exp(x / T) of a word outside has in the gradient; and slopes [rows,
    columns] of the words inside, which have e exp(x / T) of the hard-label part beside them."""

    outside: Any
    inside: Any
    rest: Any


@triton.jit
def topk_row(
    s,
    V,
    cap,
    words,
    rows,
    split,
    inside,
    z,
    z_label,
    mix_p,
    hard_by,
    factors,
    teacher_inverse_T,
    HOW: tl.constexpr,
    TOPK: tl.constexpr,
):
    """What the gradient needs, and the rows' loss. z: logits of the words inside."""
    if HOW.phase == "whole":
        outside, hard = read(s, V, cap, rows, inside, factors.scale, HOW)
    else:
        outside, z = told_outside(split, rows, inside, words, factors.scale, HOW, TOPK)
    student = student_of(outside, z, inside, factors, HOW, TOPK)
    if HOW.phase != "whole":
        hard, z_label = told_hard(split, rows, student.most, HOW)
    p, log_p, p_tail, log_p_tail, mass = teacher_of(
        words, rows, inside, teacher_inverse_T, HOW, TOPK
    )
    nan = (student.sum != student.sum) | (mass != mass) | weighed_wrong(rows) | inside.wrong
    counts = (student.sum > 0.0) & (mass > 0.0) & (nan == 0)
    rest = tl.where(nan, float("nan"), 0.0).to(HOW.dtype)
    D, slope, tail_slope = divergence(
        Outcomes(p, student.q, log_p, student.log_q),
        Outcomes(p_tail, student.tail_q, log_p_tail, student.tail_log_q),
        mix_p,
        HOW,
        TOPK,
    )
    if not HOW.own:
        sum = tl.where(counts, student.sum, 1.0)
        hard = Hard(student.most, sum.to(tl.float64), hard.total, hard.words)
    label = settled(hard_label(hard, z_label, rows, hard_by, HOW), counts, rest)
    loss = tl.where(factors.loss == 0.0, 0.0, factors.loss * D) + label.loss
    loss = tl.where(counts, rows.weight * loss, rest).to(HOW.dtype)
    if HOW.divergence == "reverse":  # no direction leads away from there
        nowhere = tl.where(factors.loss == 0.0, 0.0, float("nan"))
        rest += tl.where(counts & (D == INFINITY), nowhere, 0.0)
    kl = tl.where(counts, rows.scale * factors.grad, 0.0) + rest
    outside_sum = tl.where(outside.sum > 0.0, outside.sum, 1.0)
    b = tl.where(outside.sum > 0.0, kl * tail_slope / outside_sum, rest)
    if HOW.hard and not HOW.own:
        b += label.soft * tl.exp2((outside.most - finite(student.most)) * factors.scale)
    b = tl.where(counts, b + rest, rest)
    slope = tl.where((counts & (rest == 0.0))[:, None], kl[:, None] * slope, rest[:, None])
    return Gradient(b, slope, rest), outside.most, label, z, loss


@triton.jit
def write(s, g_first, V, cap, rows, gradient, most, label, hard_by, scale, HOW: tl.constexpr):
    """As if all words were outside."""
    blocks = tl.cdiv(V, HOW.block)
    for i in range(blocks):
        col = (blocks - 1 - i) * HOW.block + tl.arange(0, HOW.block)
        z = load_logits(s, rows.live, col, V, cap, HOW.capped, "evict_first", HOW)
        g = tl.exp2((z - finite(most)[:, None]) * scale) * gradient.outside[:, None]
        g = finish_gradient(g, z, col[None, :], label, rows, hard_by, gradient.rest, HOW.own, HOW)
        store_gradient(g_first, rows, col, V, g, HOW)


@triton.jit
def write_inside(g_first, rows, inside, z, gradient, label, hard_by, HOW: tl.constexpr):
    g = gradient.inside
    g = finish_gradient(g, z, inside.ids, label, rows, hard_by, gradient.rest, HOW.hard, HOW)
    g = tl.where(z == -INFINITY, gradient.rest[:, None], g)
    places = g_first[:, None] + inside.ids
    tl.store(places, in_dtype_of(g_first, g, HOW), inside.held)


@triton.jit(do_not_specialize=["N", "inner_rows", "ignore_index"])
def topk_kl_div_kernel(
    student,
    words,
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
    teacher_inverse_T: tl.float64,
    HOW: tl.constexpr,
    TOPK: tl.constexpr,
):
    """The gains are `Factors`' loss and grad; mix_p is how much of a mixture is p."""
    rows = rows_of(given, student.V, N, ignore_index, HOW)
    s = first_of(student, rows.n, inner_rows)
    student_cap = number(cap, HOW)
    factors = Factors(
        number(scale, HOW), number(inverse_T, HOW), number(loss_gain, HOW), number(grad_gain, HOW)
    )
    hard_by = HardNumbers(
        number(ce_weight, HOW), number(smoothing, HOW), number(z_loss, HOW), student_cap
    )
    inside = gather(words, rows, student.V, HOW, TOPK)
    # Before the gradient takes their places.
    z_label = load_one(s, rows.label, rows.live & (rows.label >= 0), student_cap, HOW)
    z = load_one(s[:, None], inside.ids, inside.held, student_cap, HOW)
    if HOW.phase == "sums":
        outside, hard = read(s, student.V, student_cap, rows, inside, factors.scale, HOW)
        tell_outside(split, rows, outside, inside, z, words, factors.scale, TOPK)
        tell_hard(split, rows, hard, z_label, HOW)
    else:
        gradient, most, label, z, loss = topk_row(
            s,
            student.V,
            student_cap,
            words,
            rows,
            split,
            inside,
            z,
            z_label,
            number(mix_p, HOW),
            hard_by,
            factors,
            number(teacher_inverse_T, HOW),
            HOW,
            TOPK,
        )
        tl.store(row_loss + rows.n, tl.where(rows.live, loss, 0.0), rows.there)
    if HOW.grad:
        g_first = first_of(grad, rows.n, inner_rows)
        tl.debug_barrier()  # all of the row has been read
        write(
            s, g_first, student.V, student_cap, rows, gradient, most, label, hard_by,
            factors.scale, HOW,
        )  # fmt: skip
        tl.debug_barrier()  # theirs is written over what stands there by now
        write_inside(g_first, rows, inside, z, gradient, label, hard_by, HOW)
