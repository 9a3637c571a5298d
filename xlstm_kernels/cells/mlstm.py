"""One step of the mLSTM in plain torch: matrix memory, scalar gates per head, no recurrent weights.

li = i  (input gate "sigmoid": log_sigmoid(i))         lf = log_sigmoid(f) + m
m' = max(lf, li)  (input gate "sigmoid": 0)            i' = exp(li - m')    f' = exp(lf - m')
c' = f' c + i' k v^T     n' = f' n + i' k              num = scale q c'     den = scale q n'
h  = num / (max(|den|, exp(-m')) + eps)  |  num / (den + eps)  |  num exp(m')

Source: xLSTM, arXiv 2405.04517, section 2.3 and appendix A.3; the sigmoid input gate: Tiled Flash
Linear Attention, arXiv 2503.14376.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INPUT_GATES = ("exp", "sigmoid")  # csrc/launch.h: InputGate
NORMALIZERS = ("max", "plain", "none")  # csrc/launch.h: Normalizer
# exp(-m) saturates here; csrc/cpu/mlstm.h: kLargestExponent
LARGEST_EXPONENT = 80.0


class MLSTMState(NamedTuple):
    """State of `xk.mlstm`; the memory is c exp(m), its normaliser n exp(m).

    c: (B, H, K, V).  n: (B, H, K).  m: (B, H), 0 with the sigmoid input gate.
    """

    c: Tensor
    n: Tensor
    m: Tensor


class Options(NamedTuple):
    """What chooses among the equations above."""

    input_gate: str
    normalizer: str
    scale: float
    eps: float


def log_gates(i: Tensor, f: Tensor, input_gate: str) -> tuple[Tensor, Tensor]:
    """Logarithms of the input and the forget gate."""
    return F.logsigmoid(i) if input_gate == "sigmoid" else i, F.logsigmoid(f)


def step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    i_BH: Tensor,
    f_BH: Tensor,
    state: MLSTMState,
    options: Options,
) -> tuple[Tensor, MLSTMState]:
    """h (B, H, V) and the next state."""
    c_BHKV, n_BHK, m_BH = state
    li_BH, lf_BH = log_gates(i_BH, f_BH, options.input_gate)
    lf_BH = lf_BH + m_BH
    if options.input_gate == "sigmoid":
        m_BH = torch.zeros_like(m_BH)
    else:
        m_BH = torch.where(li_BH > lf_BH, li_BH, lf_BH)
    base_BH = finite_base(m_BH)
    i_BH1, f_BH1 = (li_BH - base_BH).exp()[..., None], (lf_BH - base_BH).exp()[..., None]
    c_BHKV = f_BH1[..., None] * c_BHKV + (i_BH1 * k_BHK)[..., None] * v_BHV[..., None, :]
    n_BHK = f_BH1 * n_BHK + i_BH1 * k_BHK
    q_BHK = options.scale * q_BHK
    num_BHV = torch.einsum("bhk,bhkv->bhv", q_BHK, c_BHKV)
    den_BH = torch.einsum("bhk,bhk->bh", q_BHK, n_BHK)
    return normalize(num_BHV, den_BH, m_BH, options), MLSTMState(c_BHKV, n_BHK, m_BH)


def finite_base(m: Tensor) -> Tensor:
    """What exponents are taken from: m, or 0 where a state that holds nothing takes nothing, as
    -inf - -inf is NaN. Both weights are 0 there."""
    return m.masked_fill(m == -torch.inf, 0.0)


def normalize(num: Tensor, den: Tensor, m: Tensor, options: Options) -> Tensor:
    """h of sums `num` (..., V) and `den` (...), both times exp(-m)."""
    if options.normalizer == "none":
        return num * m.exp()[..., None]
    if options.normalizer == "max":
        bound = (-m).clamp(max=LARGEST_EXPONENT).exp()
        den = torch.where(den.abs() > bound, den.abs(), bound)
    return num / (den + options.eps)[..., None]
