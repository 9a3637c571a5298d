"""The block of recurrent language models: an sLSTM layer and a gated feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xlstm_kernels as xk


class SLSTMBlock(nn.Module):
    """x + norm(slstm(norm(x))), then x + ffn(norm(x)): the sLSTM block of arXiv:2405.04517.

    `block_ratio` is where it stands in its stack, from 0 to 1; only initialisation depends on it.
    """

    def __init__(self, width: int, heads: int, ffn: int, block_ratio: float, backend: str):
        super().__init__()
        self.heads = heads
        self.mixer_norm = nn.LayerNorm(width, bias=False)
        self.mixer = xk.nn.SLSTM(
            width, width, num_heads=heads, block_ratio=block_ratio, backend=backend
        )
        self.head_norm = nn.Parameter(torch.ones(width))
        self.ffn_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(
        self, x_BTE: Tensor, state: xk.SLSTMState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, xk.SLSTMState]:
        h_BTE, state = self.mixer(self.mixer_norm(x_BTE), state, cu_seqlens)
        x_BTE = x_BTE + self._normalise_heads(h_BTE)
        gate_BTF, value_BTF = self.up(self.ffn_norm(x_BTE)).chunk(2, dim=-1)
        return x_BTE + self.down(F.gelu(gate_BTF, approximate="tanh") * value_BTF), state

    def _normalise_heads(self, h_BTE: Tensor) -> Tensor:
        h_BTHD = h_BTE.unflatten(-1, (self.heads, -1))
        return F.layer_norm(h_BTHD, h_BTHD.shape[-1:]).flatten(-2) * self.head_norm

    @torch.no_grad()
    def reset_feed_forward(self, layers: int) -> None:
        """Residual branches that do not add up with depth."""
        width, ffn = self.up.in_features, self.down.in_features
        nn.init.normal_(self.up.weight, std=width**-0.5)
        nn.init.normal_(self.down.weight, std=(2 * layers * ffn) ** -0.5)
