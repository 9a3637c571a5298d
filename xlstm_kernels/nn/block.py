"""The block of xLSTM-7B."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_is_number, check_is_positive
from ..cells import MLSTMState
from .mlstm import MLSTM, residual_init, small_init


class XLSTMBlock(nn.Module):
    """x + MLSTM(norm(x)), then x + FFN(norm(x)): RMS norms and a gated FFN, as in xLSTM-7B.

    FFN(x) = W_down (silu(W_gate x) * W_up x).

    Args:
        embedding_dim: features of the input and the output; a multiple of `num_heads`.
        num_heads: heads of the mLSTM.
        ffn_ratio: features of the FFN, as a share of `embedding_dim`, rounded up to a multiple of
            `ffn_multiple`.
        ffn_multiple: see there; 64 as in xLSTM-7B.
        num_blocks: of the model that the block is part of, for the initialisation: the two
            projections that add to the residual, `mlstm.out` and `down`, start with standard
            deviation 2 / (num_blocks sqrt(embedding_dim)); None: small as the others.
        options: of `MLSTM`, `device` and `dtype` among them.

    forward(x, state=None, cu_seqlens=None) -> (y, state) and step(x, state=None, inplace=False) ->
    (y, state) take and return what `MLSTM` does, with embedding_dim features.

    State dict: `mlstm.*` as `MLSTM` has it; `norm_mlstm.weight` and `norm_ffn.weight` (E);
    `gate_up.weight` (2 F, E), gate rows first; `down.weight` (E, F).

    Source: xLSTM-7B, arXiv 2503.13427, section 3.1 and appendix A.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        *,
        ffn_ratio: float = 2.667,
        ffn_multiple: int = 64,
        num_blocks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        check_is_number("XLSTMBlock", "ffn_ratio", ffn_ratio)
        if not 0 < ffn_ratio < math.inf:
            raise ValueError(f"XLSTMBlock: ffn_ratio must be above 0 and finite, got {ffn_ratio}")
        check_is_positive("XLSTMBlock", "ffn_multiple", ffn_multiple)
        made: Any = {"device": device, "dtype": dtype}
        options |= {"num_blocks": num_blocks} | made
        self.mlstm = MLSTM(embedding_dim, embedding_dim, num_heads, **options)
        features = -int(-embedding_dim * ffn_ratio // ffn_multiple) * ffn_multiple
        self.norm_mlstm = nn.RMSNorm(embedding_dim, eps=1e-6, **made)
        self.norm_ffn = nn.RMSNorm(embedding_dim, eps=1e-6, **made)
        self.gate_up = nn.Linear(embedding_dim, 2 * features, False, **made)
        self.down = nn.Linear(features, embedding_dim, False, **made)
        self.reset_ffn()

    def reset_parameters(self) -> None:
        """Initialises the block as it was made, its layers included."""
        self.mlstm.reset_parameters()
        for norm in (self.norm_mlstm, self.norm_ffn):
            norm.reset_parameters()
        self.reset_ffn()

    def reset_ffn(self) -> None:
        small_init(self.gate_up)
        residual_init(self.down, self.down.out_features, self.mlstm.num_blocks)

    def forward(
        self,
        x: Tensor,
        state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MLSTMState]:
        """Runs the block over sequences; see the class for shapes."""
        y, last = self.mlstm(self.norm_mlstm(x), state, cu_seqlens)
        return self._ffn(x + y), last

    def step(
        self,
        x: Tensor,
        state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, MLSTMState]:
        """One token: x (B, embedding_dim) -> y (B, embedding_dim), and the next state."""
        y, last = self.mlstm.step(self.norm_mlstm(x), state, inplace)
        return self._ffn(x + y), last

    def _ffn(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm_ffn(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)
