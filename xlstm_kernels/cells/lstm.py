"""LSTM, one step, gates in torch.nn.LSTM's order.

c' = sigmoid(f) c + sigmoid(i) tanh(z)
h' = sigmoid(o) tanh(c')
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LSTMState(NamedTuple):
    """Hidden state and cell, each (B, H, D); float32, float64 for float64 x.

    The state before the first token is zero.
    """

    h: Tensor
    c: Tensor


def step(raw_BGHD: Tensor, state: tuple[Tensor, ...], n_floor: float) -> tuple[Tensor, ...]:
    i, f, z, o = raw_BGHD.unbind(1)
    _, c = state
    c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c_new), c_new
