"""The sLSTM layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_is_number
from ..cells import GATES, SLSTMState
from ..ops.recurrence.api import check_slstm_options, slstm
from .recurrent import SequenceLayer


class SLSTM(SequenceLayer):
    """sLSTM over sequences: an input projection to four gates, then `xk.slstm`.

    Args:
        input_size: features of the input.
        hidden_size: features of the output; a multiple of `num_heads`.
        num_heads: heads that do not see one another's hidden state. 4, as in the xLSTM paper and
            package; fewer heads mix more and cost more.
        bias: whether the gates have a bias.
        batch_first: True (unlike nn.LSTM's default): x and h are (B, T, ...); False: (T, B, ...).
        forget_gate: "sigmoid" or "exp".
        n_floor: lower bound of the normaliser; 1.0 is flashrnn's, 0.0 is xlstm's.
        clip_grad: bound on each element of the gradient that flows back in time through
            `weight_hh`.
        block_ratio: where the layer stands in its stack, 0 (first) to 1 (last); only initialisation
            depends on it.
        backend: as in `xk.slstm`.

    forward(x, state=None, cu_seqlens=None) -> (h, state):
        x: (B, T, input_size), or (T, input_size) for one sequence without a batch axis.
        state: SLSTMState(h, c, n, m), each (B, H, D) float32, or (H, D) without a batch axis; None
            is zeros. Pass the returned state to go on.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences; x is then (1, T, input_size)
            or (T, input_size), and states have S rows.
        h: (B, T, hidden_size) or (T, hidden_size).

    State dict, gates in the order i f z o:
        weight_ih  (4 * hidden_size, input_size)  gate-major, then head-major rows
        weight_hh  (4, H, D, D)  [gate, head, out, in]
        bias       (4, H, D)     absent with bias=False

    Initialisation, as published with xLSTM (arXiv 2405.04517; github.com/NX-AI/xlstm, sLSTM layer):
    `weight_ih` normal with variance 2 / (5 input_size) (arXiv 1910.05895), `weight_hh` zero, biases
    zero but for the forget gate's, 5 - 12 (d / (D - 1)) ** (0.3 + 1.3 block_ratio) for unit d of
    each head: from slow forgetting (half-life about 100 steps) to none of the past kept. With
    forget_gate="exp" it starts at log_sigmoid of that, which forgets at the same rates.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_heads: int = 4,
        bias: bool = True,
        batch_first: bool = True,
        *,
        forget_gate: str = "sigmoid",
        n_floor: float = 0.0,
        clip_grad: float | None = None,
        block_ratio: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_slstm_options("SLSTM", forget_gate, n_floor, clip_grad)
        check_is_number("SLSTM", "block_ratio", block_ratio)
        if not 0.0 <= block_ratio <= 1.0:
            raise ValueError(f"SLSTM: block_ratio must be within 0 and 1, got {block_ratio}")
        self.forget_gate, self.n_floor, self.clip_grad = forget_gate, n_floor, clip_grad
        self.block_ratio = block_ratio
        super().__init__(
            *(input_size, hidden_size, num_heads),
            bias=bias,
            batch_first=batch_first,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_ih, std=math.sqrt(2 / (5 * self.input_size)))
        nn.init.zeros_(self.weight_hh)
        if self.bias is None:
            return
        nn.init.zeros_(self.bias)
        depth_D = torch.arange(self.head_dim, device=self.bias.device) / max(self.head_dim - 1, 1)
        forget_D = 5.0 - 12.0 * depth_D ** (0.3 + 1.3 * self.block_ratio)
        if self.forget_gate == "exp":
            forget_D = F.logsigmoid(forget_D)
        self.bias[GATES.index("f")] = forget_D.to(self.bias.dtype)

    def recurrence(
        self, x_BTGHD: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, SLSTMState]:
        return slstm(
            *(x_BTGHD, self.weight_hh, self.bias, state),
            forget_gate=self.forget_gate,
            n_floor=self.n_floor,
            clip_grad=self.clip_grad,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

    def _options(self) -> dict[str, Any]:
        usual = {"forget_gate": "sigmoid", "n_floor": 0.0, "clip_grad": None, "block_ratio": 0.0}
        given = {key: getattr(self, key) for key in usual}
        return super()._options() | {k: v for k, v in given.items() if v != usual[k]}
