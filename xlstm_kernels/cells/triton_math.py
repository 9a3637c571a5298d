"""Functions of the gates in Triton, float32, to the last digits; NaN stays NaN.

Triton's own exp multiplies by log2(e) first, whose rounding costs a large x its last digits, and a
tanh of exponentials has none left near 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """2^n exp(r), exp(r) by a polynomial of least maximum error. ln 2 is in two parts, of which n
    times the first is exact."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.1219444005469057e-4
    p = 0.041668400 + r * (0.0083688507 + r * 0.0013814326)
    p = 0.49999994 + r * (0.16666520 + r * p)
    return (1.0 + (r + r * r * p)) * tl.exp2(n)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log1p(exp(-|x|)), the logarithm as 2 atanh(s) by its series: s <= 1/3, and a
    small one keeps its digits."""
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    z = s * s
    series = 1.0 / 15 + z * (1.0 / 17)
    series = 1.0 / 9 + z * (1.0 / 11 + z * (1.0 / 13 + z * series))
    series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * series)))
    return tl.minimum(x, 0.0) - 2.0 * s * series


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2 |x|) + 1); near 0 a polynomial, of least maximum error."""
    square = x * x
    p = -0.053832255 + square * (0.020984862 + square * -0.0061465330)
    near = x + x * square * (-0.33333313 + square * (0.13332407 + square * p))
    size = tl.abs(x)
    far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5625, near, tl.where(x < 0, -far, far))


@triton.jit
def narrowed(x, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """In `dtype`, rounded; EMULATED: in the interpreter, which cuts float32 to bfloat16."""
    if EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
