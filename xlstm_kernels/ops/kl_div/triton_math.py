"""Functions of the losses' Triton kernels that Triton has not, or not to full precision.

Polynomials are least-maximum-error fits for float32; float64 goes through tl.exp and tl.log, which
are exact there. On a GPU those of float32 are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells.triton_math import tanh as tanh_of_float32


@triton.jit
def tanh(x):
    """To full relative precision near 0 too."""
    if x.dtype == tl.float64:
        a = tl.abs(x)
        t = tl.exp(-2.0 * a)
        # 1 - t by the rounding of t, which its logarithm tells.
        log = tl.where((t == 1.0) | (t == 0.0), -2.0 * a - 1.0, tl.log(tl.maximum(t, 1e-300)))
        less = tl.where(t == 1.0, 2.0 * a, (1.0 - t) * (-2.0 * a) / log)
        y = tl.where(a < 0.625, less / (2.0 - less), 1.0 - 2.0 * t / (1.0 + t))
        return tl.where(x < 0.0, -y, y)
    else:
        return tanh_of_float32(x)


@triton.jit
def log_of_ratio(r, less_one):
    """ln r and r ln r - r + 1 of r > 0, normal, given r and r - 1, each rounded once: the latter is
    (r - 1)^2 / 2 near 1. csrc/common/log.h has the equations."""
    if r.dtype == tl.float64:
        u = 1.0 + less_one
        apart = tl.where(u == 1.0, 1.0, u - 1.0)
        near = tl.where(u == 1.0, less_one, tl.log(u) * (less_one / apart))
        log = tl.where(tl.abs(less_one) < 0.25, near, tl.log(r))
        return log, r * log - less_one
    else:
        bits = r.to(tl.int32, bitcast=True)
        octave = (bits - 0x3F3504F3) >> 23  # 0x3f3504f3: sqrt(1/2)
        close = octave == 0
        reduced = (bits - (octave << 23)).to(tl.float32, bitcast=True) - 1.0
        s = tl.where(close, less_one, reduced)
        P = -1.175348386e-01 + 7.119417936e-02 * s
        P = 1.176252067e-01 + P * s
        P = -1.238488108e-01 + P * s
        P = 1.423413604e-01 + P * s
        P = -1.666962951e-01 + P * s
        P = 2.000143975e-01 + P * s
        P = -2.499997169e-01 + P * s
        P = 3.333332241e-01 + P * s
        P = -0.5 + P * s
        square = s * s
        log = octave.to(tl.float32) * 6.931471806e-01 + (square * P + s)
        near = square * ((P * s + P) + 1.0)
        return log, tl.where(close, near, r * log - less_one)


@triton.jit
def ln(r):
    """Of r >= 0; NaN stays."""
    known = r > 0.0
    r_1 = tl.where(known, r, 1.0)
    log, _ = log_of_ratio(r_1, r_1 - 1.0)
    return tl.where(known, log, tl.where(r == 0.0, float("-inf"), r))


@triton.jit
def sum_lanes(x):
    """[rows] of [rows, lanes], in float64: most of it in groups first, whose roundings average."""
    GROUPS: tl.constexpr = min(128, x.shape[1])
    x = tl.sum(tl.reshape(x, [x.shape[0], GROUPS, x.shape[1] // GROUPS]), 2)
    return tl.sum(x.to(tl.float64), 1)
