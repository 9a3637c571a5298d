"""TiRex's sLSTM cell, in one kernel.

The package rounds gates, weights and states to bfloat16 at every step; ours stay in the input's
dtype and float32, so results agree to bfloat16's accuracy and are closer to exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .swap import Found, Swap, Swapped, fused_backend, no_kernel, swapped_class
from .xlstm import by_gate, run_cell


class FusedSLSTMCell(Swapped):
    """`sLSTMCell`: input (B, T, 4 E), gate-major, and states (4, B, E) or None."""

    config: Any
    _recurrent_kernel_: Tensor
    _bias_: Tensor

    def forward(self, input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if not input.is_cpu:
            return self.replaced.forward(self, input, state)
        H, D = self.config.num_heads, self.config.head_dim
        weights = by_gate(self._recurrent_kernel_, self._bias_, H, D, cuda=True)
        h_BTHD, last = run_cell("slstm", input.unflatten(-1, (4, H, D)), weights, state)
        return h_BTHD.transpose(1, 2), last


KNOWN = ("tirex.models.slstm.cell.sLSTMCell",)


def find(layer: nn.Module) -> Found:
    weight = next(layer.parameters())
    backend = fused_backend("recurrence", weight, weight, "slstm")
    if backend is None:
        return no_kernel("slstm", weight)
    return Swap(swapped_class(FusedSLSTMCell, type(layer)), backend, "every call, in float32")
