"""One step of the mLSTM in plain torch, any float dtype: cells/mlstm.py in the compute dtype."""

from __future__ import annotations

from torch import Tensor

from ...cells import compute_dtype, no_autocast
from ...cells.mlstm import MLSTMState, Options, step


def forward(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    i_BH: Tensor,
    f_BH: Tensor,
    state: MLSTMState,
    options: Options,
) -> tuple[Tensor, MLSTMState]:
    """h (B, H, V) in q's dtype and the next state in the compute dtype."""
    dtype = compute_dtype(q_BHK.dtype)
    with no_autocast(q_BHK.device):
        q, k, v, i, f = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, i_BH, f_BH))
        before = MLSTMState(*(part.to(dtype) for part in state))
        h_BHV, after = step(q, k, v, i, f, before, options)
    return h_BHV.to(q_BHK.dtype), after
