"""One step of each cell and its gradient in Triton: the equations in lstm.py and slstm.py, and in
csrc/cells, where the gradients are derived.

`step(raw, state, n_floor)` takes the gates (i, f, z, o) and the states (h, c, ...), and returns the
next states. `step_grad(raw, state, d, n_floor)` takes besides the gradients of the states after the
step, and returns those of the gates and of the states before it: h has none but what the recurrent
product gives.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .triton_math import exp, log_sigmoid, sigmoid, tanh


@triton.jit
def lstm_step(raw, state, n_floor):
    i, f, z, o = raw
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(z)
    return sigmoid(o) * tanh(c), c


@triton.jit
def lstm_step_grad(raw, state, d, n_floor):
    _, c = state
    dh, dc = d
    i, f, z, o = sigmoid(raw[0]), sigmoid(raw[1]), tanh(raw[2]), sigmoid(raw[3])
    tanh_c = tanh(f * c + i * z)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    di = dc * z * i * (1.0 - i)
    df = dc * c * f * (1.0 - f)
    dz = dc * i * (1.0 - z * z)
    do = dh * tanh_c * o * (1.0 - o)
    return (di, df, dz, do), (dh, dc * f)


@triton.jit
def slstm_gates(raw, state, EXP_FORGET: tl.constexpr):
    """i', f', tanh(z), 1 / o', whether i wins, and m'. One of i', f' is exp(0)."""
    i, f, z, o = raw
    _, _, n, m = state
    lf = m + (f if EXP_FORGET else log_sigmoid(f))
    i_wins = (n == 0) | (i > lf)
    exponent = tl.where(i_wins, lf - i, i - lf)
    lower = exp(tl.where(exponent > 80.0, 80.0, exponent))
    i_gate, f_gate = tl.where(i_wins, 1.0, lower), tl.where(i_wins, lower, 1.0)
    return i_gate, f_gate, tanh(z), 1.0 + exp(-o), i_wins, tl.where(i_wins, i, lf)


@triton.jit
def slstm_next(raw, state, n_floor, EXP_FORGET: tl.constexpr):
    i, f, z, o_inverse, _, m_new = slstm_gates(raw, state, EXP_FORGET)
    _, c, n, _ = state
    c_new = f * c + i * z
    n_new = f * n + i
    n_new = tl.where(n_new < n_floor, n_floor, n_new)
    return c_new / (n_new * o_inverse), c_new, n_new, m_new


@triton.jit
def slstm_grad(raw, state, d, n_floor, EXP_FORGET: tl.constexpr):
    """Through the stabiliser m as well; z dc + dn cancels where z is near c'/n'."""
    i, f, z, o_inverse, i_wins, _ = slstm_gates(raw, state, EXP_FORGET)
    _, c, n, _ = state
    dh, dc, dn, dm = d
    o = 1.0 / o_inverse
    n_sum = f * n + i
    floored = n_sum < n_floor
    n_inverse = 1.0 / tl.where(floored, n_floor, n_sum)
    mean = (f * c + i * z) * n_inverse
    weight = dh * o * n_inverse
    dc += weight
    dn = tl.where(floored, 0.0, dn - weight * mean)
    di = i * (z * dc + dn)  # by log i', at fixed m'
    # By log f', at fixed m'. Beyond 1 f' is at n == 0 only, and 5.54e34 is where it saturates.
    dlf = tl.where(f < 5.54e34, f * (c * dc + n * dn), 0.0)
    # m' = log i' or log f' takes dm - di - dlf on top of its own.
    dlf_total = tl.where(i_wins, dlf, dm - di)
    di = tl.where(i_wins, dm - dlf, di)
    df = dlf_total if EXP_FORGET else dlf_total * sigmoid(-raw[1])
    return (di, df, i * dc * (1.0 - z * z), dh * mean * o * (1.0 - o)), (
        dh,
        f * dc,
        f * dn,
        dlf_total,
    )


@triton.jit
def slstm_step(raw, state, n_floor):
    return slstm_next(raw, state, n_floor, False)


@triton.jit
def slstm_step_grad(raw, state, d, n_floor):
    return slstm_grad(raw, state, d, n_floor, False)


@triton.jit
def slstm_exp_step(raw, state, n_floor):
    return slstm_next(raw, state, n_floor, True)


@triton.jit
def slstm_exp_step_grad(raw, state, d, n_floor):
    return slstm_grad(raw, state, d, n_floor, True)


# By the names of CELLS.
STEPS: dict[str, tuple[Any, Any]] = {
    "slstm": (slstm_step, slstm_step_grad),
    "slstm_exp": (slstm_exp_step, slstm_exp_step_grad),
    "lstm": (lstm_step, lstm_step_grad),
}
