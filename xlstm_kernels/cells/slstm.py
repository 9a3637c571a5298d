"""sLSTM, one step (xLSTM, arXiv 2405.04517, section 2.2 and appendix A.2).

lf = log_sigmoid(f) + m                        (exponential forget gate: lf = f + m)
m' = i if n == 0 or i > lf, else lf
c' = exp(lf - m') c + exp(i - m') tanh(z)
n' = max(exp(lf - m') n + exp(i - m'), n_floor)
h' = sigmoid(o) c' / n'

Where n == 0 the exponent lf - m' has no upper bound; it saturates at 80.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SLSTMState(NamedTuple):
    """Hidden state, cell, normaliser and stabiliser, each (B, H, D); float32 (float64 for float64).

    c and n are stored divided by exp(m); h' does not depend on the choice of m. The state before
    the first token is zero in all four.
    """

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


def step(raw_BGHD: Tensor, state: tuple[Tensor, ...], n_floor: float) -> tuple[Tensor, ...]:
    return _step(raw_BGHD, state, n_floor, F.logsigmoid(raw_BGHD[:, 1]))


def step_exp(raw_BGHD: Tensor, state: tuple[Tensor, ...], n_floor: float) -> tuple[Tensor, ...]:
    return _step(raw_BGHD, state, n_floor, raw_BGHD[:, 1])


def _step(
    raw_BGHD: Tensor, state: tuple[Tensor, ...], n_floor: float, log_f_BHD: Tensor
) -> tuple[Tensor, ...]:
    i, _, z, o = raw_BGHD.unbind(1)
    _, c, n, m = state
    lf = log_f_BHD + m
    i_wins = (n == 0) | (i > lf)
    m_new = torch.where(i_wins, i, lf)
    # One of the two exponents is zero; subtracting m_new from it would leave rounding in gradients.
    lower = torch.exp(torch.where(i_wins, lf - i, i - lf).clamp(max=80.0))
    i_gate, f_gate = torch.where(i_wins, 1.0, lower), torch.where(i_wins, lower, 1.0)
    c_new = f_gate * c + i_gate * torch.tanh(z)
    n_sum = f_gate * n + i_gate
    n_new = torch.where(n_sum < n_floor, n_floor, n_sum)
    return torch.sigmoid(o) * c_new / n_new, c_new, n_new, m_new
