"""How sums of exponentials go over to a larger logit, which from there on they are relative to.

The factor is a = 2^-u, u = lift log2(e) / T. Rounded to one number, those of student and teacher
would be off by 1e-7 each, and so would be KL, however small it is. So a = 2^n (1 + more), and sums
become 2^n (sum + more sum): 2^n is exact, and the rounding of `more sum` is another one in every
lane. For the digits of `more`, u comes in parts: products of 12 bits of lift with 12 bits of
log2(e) / T are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_rows import INFINITY, grown


class Scale(NamedTuple):
    """log2(e) / T: all of it, the first 12 bits, and the others."""

    all: Any
    coarse: Any
    fine: Any


class Top(NamedTuple):
    """Of each row: the largest logit so far, how much larger it is than the one before, and the two
    parts of a. Before the first block the parts are 0."""

    most: Any
    lift: Any
    power: Any
    more: Any


@triton.jit
def no_top(none):
    zero = tl.where(none == -INFINITY, 0.0, none)
    return Top(none, zero, zero, zero)


@triton.jit
def first_bits(x):
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) & -0x20000000).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)


@triton.jit
def exp2_less_one(r):
    """Of |r| <= 1/2; a polynomial of least maximum error for float32, 6e-9."""
    if r.dtype == tl.float64:
        return tl.exp2(r) - 1.0
    else:
        P = 1.546261785e-04 + r * 1.530473178e-05
        P = 9.618053714e-03 + r * (1.333347522e-03 + r * P)
        return r * (6.931471806e-01 + r * (2.402265094e-01 + r * (5.550410909e-02 + r * P)))


@triton.jit
def risen(top, z, scale):
    most, lift = grown(top.most, z)
    first = first_bits(lift)
    parts = -first * scale.coarse
    rest = -(lift - first) * scale.coarse
    fine = -lift * scale.fine
    n = tl.floor(parts + rest + fine + 0.5)
    power = tl.where(top.most == -INFINITY, 0.0, tl.exp2(n))
    more = exp2_less_one(((parts - n) + rest) + fine)
    return Top(most, lift, power, tl.where(power > 0.0, more, 0.0))


@triton.jit
def rescaled(sum, top):
    return top.power[:, None] * (sum + top.more[:, None] * sum)


@triton.jit
def difference(s, t):
    """a_s - a_t, where they are nearly equal to the digits of the difference."""
    apart = s.power * (1.0 + s.more) - t.power * (1.0 + t.more)
    return tl.where(s.power == t.power, s.power * (s.more - t.more), apart)
