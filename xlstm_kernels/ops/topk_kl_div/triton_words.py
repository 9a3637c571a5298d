"""Outcomes of the Triton kernel of divergences from a teacher of few words: the words that came,
each once, and all others as one.
  a = mass^(1/T), A = n (r / n)^(1/T) for n words outside, total = sum a + A
  p = a / total inside, A / total for the outside as one outcome; q likewise from the student
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..kl_div.triton_math import ln
from ..kl_div.triton_mixture import mixture, terms
from ..kl_div.triton_rows import INFINITY, finite


class Words(NamedTuple):
    """logprobs, in the compute dtype, and ids, int64, (N, K), and tail_logmass (N,); how many words
    there are in all, and the first that the student's columns are of."""

    logprobs: Any
    ids: Any
    tail: Any
    K: Any
    V: Any
    first: Any


class TopK(NamedTuple):
    """What the kernel is compiled for beside `How`: columns of a row of words, and words that are
    compared with all others at once; the support, and whether the tail's mass is given."""

    columns: int
    step: int
    support: str
    with_tail: bool
    tail_given: bool


class Inside(NamedTuple):
    """[rows, columns]: the student's columns that ids are; whether it is the first of its word, and
    of one that has a column here; the logarithm of all its mass. [rows]: whether an id is out of
    range."""

    ids: Any
    first: Any
    held: Any
    log_mass: Any
    wrong: Any


class Outcomes(NamedTuple):
    """Probabilities and their logarithms of the words inside [rows, columns], or of all others as
    one outcome [rows]."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any


@triton.jit
def load_words(words, rows, k, HOW: tl.constexpr):
    """ids, -1 where there is none, and logarithms of masses."""
    mask = rows.live[:, None] & (k < words.K)[None, :]
    places = rows.n[:, None] * words.K + k[None, :]
    ids = tl.load(words.ids + places, mask, other=-1)
    log_p = tl.load(words.logprobs + places, mask & (ids >= 0), other=-INFINITY)
    return ids, log_p


@triton.jit
def gather(words, rows, V_student, HOW: tl.constexpr, TOPK: tl.constexpr):
    """Masses of a word that comes several times are added up at the first."""
    k = tl.arange(0, TOPK.columns)
    ids, _ = load_words(words, rows, k, HOW)
    most = tl.full([HOW.rows, TOPK.columns], -INFINITY, HOW.dtype)
    sum = tl.full([HOW.rows, TOPK.columns], 0, HOW.dtype)
    before = tl.full([HOW.rows, TOPK.columns], 0, tl.int32)
    for begin in range(0, words.K, TOPK.step):
        j = begin + tl.arange(0, TOPK.step)
        ids_j, log_p_j = load_words(words, rows, j, HOW)
        same = (ids[:, :, None] == ids_j[:, None, :]) & (ids_j >= 0)[:, None, :]
        log_same = tl.where(same, log_p_j[:, None, :], -INFINITY)
        larger = tl.maximum(most, tl.max(log_same, 2))
        here = tl.sum(tl.exp(log_same - finite(larger)[:, :, None]), 2)
        sum = sum * tl.exp(most - finite(larger)) + here
        most = larger
        earlier = same & (j[None, None, :] < k[None, :, None])
        before += tl.sum(earlier.to(tl.int32), 2)
    first = (ids >= 0) & (before == 0)
    wrong = tl.max(((ids < -1) | (ids >= words.V)).to(tl.int32), 1) > 0
    # A word that comes once keeps its logarithm: ln 1 is 0.
    log_mass = tl.where(first, tl.where(sum == 0.0, -INFINITY, finite(most) + ln(sum)), -INFINITY)
    first = first & (ids < words.V)
    ids -= words.first
    held = first & (ids >= 0) & (ids < V_student)
    return Inside(ids, first, held, log_mass, wrong)


@triton.jit
def log_tail(words, rows, inside, inverse_T, HOW: tl.constexpr, TOPK: tl.constexpr):
    """ln(n (r / n)^(1/T)) of the n words outside."""
    log_r = rows.weight * 0.0 - INFINITY
    if TOPK.with_tail:
        n = (words.V - tl.sum(inside.first.to(tl.int32), 1)).to(HOW.dtype)
        log_n = ln(tl.maximum(n, 1.0))
        if TOPK.tail_given:
            log_r = tl.load(words.tail + rows.n, rows.live, other=-INFINITY)
        else:
            left = 1.0 - tl.sum(tl.exp(inside.log_mass), 1)
            log_r = ln(tl.where(left < 0.0, 0.0, left))
        log_r = tl.where(n > 0.0, log_n + (log_r - log_n) * inverse_T, -INFINITY)
    return log_r


@triton.jit
def teacher_of(words, rows, inside, inverse_T, HOW: tl.constexpr, TOPK: tl.constexpr):
    """p and log p inside, the same of the tail, and the sum they were divided by: 0 or NaN where
    there is no teacher."""
    tail = log_tail(words, rows, inside, inverse_T, HOW, TOPK)
    log_p = inside.log_mass * inverse_T
    # Less the largest: powers of 1 / T underflow, and weights of samples may be of any size.
    most = finite(tl.maximum(tl.max(log_p, 1), tail))
    log_p -= most[:, None]
    tail -= most
    p = tl.exp(log_p)
    p_tail = tl.exp(tail)
    sum = tl.sum(p, 1) + p_tail
    whole = tl.where(sum > 0.0, sum, 1.0)
    log_sum = ln(whole)
    return p / whole[:, None], log_p - log_sum[:, None], p_tail / whole, tail - log_sum, sum


@triton.jit
def product(x, log):
    return tl.where(x == 0.0, 0.0, x * log)


@triton.jit
def outcome_terms(o, by, HOW: tl.constexpr):
    """An outcome's part of the loss, and its slope q h."""
    if HOW.divergence == "forward":
        slope = o.q - o.p
        loss = product(o.p, o.log_p - o.log_q) + slope
    elif HOW.divergence == "reverse":
        slope = product(o.q, o.log_q - o.log_p)
        loss = slope + (o.p - o.q)
    else:
        loss, slope = terms(o.p, o.q, o.p - o.q, by, HOW)
    return loss, slope


@triton.jit
def divergence(inside, tail, mix_p, HOW: tl.constexpr, TOPK: tl.constexpr):
    """D, and its derivatives by the logits times T: of the words inside, and of the tail as one."""
    if TOPK.support == "truncated":
        loss = tl.sum(product(inside.p, inside.log_p - inside.log_q), 1)
        mass = tl.sum(inside.p, 1)
        return loss, mass[:, None] * inside.q - inside.p, mass * tail.q
    apart = 0.5 * (tl.sum(tl.abs(inside.p - inside.q), 1) + tl.abs(tail.p - tail.q))
    far = (apart < 0.5) == 0
    losses, slopes = outcome_terms(inside, mixture(mix_p, far[:, None]), HOW)
    loss = tl.sum(losses, 1)
    slope = tl.sum(slopes, 1)
    tail_slope = slope * 0.0
    if TOPK.support != "both":
        loss_t, slope_t = outcome_terms(tail, mixture(mix_p, far), HOW)
        loss += loss_t
        slope += slope_t
        tail_slope = slope_t - tail.q * slope
    return tl.where(loss < 0.0, 0.0, loss), slopes - inside.q * slope[:, None], tail_slope
