"""Divergences that look at p and q together, element by element: their parts of the loss, and the
slopes q h, where h is the loss's derivative by q, less what it is at p = q:
  d = p - q      m = mix p + rest q      y = d / m      phi(r) = r ln r - r + 1
                loss                                  h
  js            m (mix phi(p/m) + rest phi(q/m))      rest ln(q/m)
  skew          m phi(p/m)                            -rest^2 y
  skew_reverse  m phi(q/m)                            ln(q/m) + mix rest y
  tv            |d| / 2                               -sign(d) / 2
From d everything is exact to its own order where student and teacher nearly agree. Where they are
far apart, h is nearly the same wherever p << q, and less what it is there:
  js  rest ln(rest q/m)      skew  -rest p/m      skew_reverse  ln(rest q/m) + mix p/m
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_math import ln, log_of_ratio


class Mixture(NamedTuple):
    """Numbers, and of each row whether student and teacher are far apart."""

    mix: Any
    rest: Any
    log_rest: Any
    far: Any


@triton.jit
def mixture(mix, far):
    rest = 1.0 - mix
    return Mixture(mix, rest, ln(rest), far)


@triton.jit
def terms(p, q, d, by, HOW: tl.constexpr):
    """(loss, slope) of elements whose rows `by` is of."""
    if HOW.divergence == "tv":
        half = q * 0.5
        slope = tl.where(d > 0.0, -half, tl.where(d < 0.0, half, 0.0))
        return tl.abs(d) * 0.5, slope
    # Below these there is no mass that counts; logarithms take no denormal numbers.
    if p.dtype == tl.float64:
        LEAST_MASS: tl.constexpr = 1e-290
        LEAST_RATIO: tl.constexpr = 1e-300
    else:
        LEAST_MASS: tl.constexpr = 1e-30
        LEAST_RATIO: tl.constexpr = 1e-37
    m = p * by.mix + q * by.rest
    inverse = 1.0 / tl.maximum(m, LEAST_MASS)
    loss = m * 0.0
    slope = m * 0.0
    if HOW.divergence != "skew_reverse":
        _, cost_p = log_of_ratio(tl.maximum(p * inverse, LEAST_RATIO), d * inverse * by.rest)
        loss = m * cost_p
    if HOW.divergence == "skew":
        slope = q * inverse * tl.where(by.far, -by.rest * p, -by.rest * by.rest * d)
    else:
        less_one = -by.mix * inverse * tl.where(by.far, p, d)
        ratio = q * inverse * tl.where(by.far, by.rest, 1.0)
        log_q, cost_q = log_of_ratio(tl.maximum(ratio, LEAST_RATIO), less_one)
        kl_q = tl.where(by.far, q * (log_q - by.log_rest) + (m - q), m * cost_q)
        if HOW.divergence == "js":
            loss = by.mix * loss + by.rest * kl_q
            slope = by.rest * q * log_q
        else:
            loss = kl_q
            slope = q * (log_q - less_one * tl.where(by.far, 1.0, by.rest))
    return loss, slope
