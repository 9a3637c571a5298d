"""The LSTM layer and its single step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_is_tensor
from ..cells import GATES, LSTMState
from ..ops.recurrence.api import lstm
from .recurrent import Recurrent, SequenceLayer


class LSTM(SequenceLayer):
    """LSTM over sequences: an input projection to four gates, then `xk.lstm`.

    With num_heads=1 it computes what a single-layer `torch.nn.LSTM` does; `LSTM.from_torch` takes
    over such a module's weights.

    Args:
        input_size: features of the input.
        hidden_size: features of the output; a multiple of `num_heads`.
        num_heads: heads that do not see one another's hidden state; 1 is the dense LSTM.
        bias: whether the gates have a bias.
        batch_first: True (unlike nn.LSTM's default): x and h are (B, T, ...); False: (T, B, ...).
        backend: as in `xk.lstm`.

    forward(x, state=None, cu_seqlens=None) -> (h, state):
        x: (B, T, input_size), or (T, input_size) for one sequence without a batch axis.
        state: LSTMState(h, c), each (B, H, D) float32, or (H, D) without a batch axis; None is
            zeros. Pass the returned state to go on.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences; x is then (1, T, input_size)
            or (T, input_size), and states have S rows.
        h: (B, T, hidden_size) or (T, hidden_size).

    State dict, gates in nn.LSTM's order i f z o (nn.LSTM calls z g):
        weight_ih  (4 * hidden_size, input_size)  nn.LSTM's weight_ih_l0
        weight_hh  (4, H, D, D)  [gate, head, out, in]; weight_hh_l0 viewed as (4, 1, D, D)
        bias       (4, H, D)     bias_ih_l0 + bias_hh_l0; absent with bias=False

    Initialisation is nn.LSTM's: uniform within 1 / sqrt(hidden_size), and `weight_hh` within
    1 / sqrt(D).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_heads: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            *(input_size, hidden_size, num_heads),
            bias=bias,
            batch_first=batch_first,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        _uniform_like_torch(self)

    def recurrence(
        self, x_BTGHD: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LSTMState]:
        return lstm(
            *(x_BTGHD, self.weight_hh, self.bias, state),
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

    @classmethod
    def from_torch(cls, module: nn.LSTM, *, backend: str = "auto") -> LSTM:
        """A layer with a copy of the weights of a single-layer, one-directional `torch.nn.LSTM`.

        `batch_first` is the module's. States differ in shape: nn.LSTM's are (1, B, hidden_size),
        this layer's are (B, 1, hidden_size).
        """
        if not isinstance(module, nn.LSTM):
            raise TypeError(
                f"LSTM.from_torch: module must be a torch.nn.LSTM, got {type(module).__name__}"
            )
        for option, only in {"num_layers": 1, "bidirectional": False, "proj_size": 0}.items():
            if getattr(module, option) != only:
                raise NotImplementedError(
                    f"LSTM.from_torch: module must have {option}={only}, got"
                    f" {option}={getattr(module, option)}"
                )
        weight_ih, weight_hh, *biases = module.all_weights[0]
        layer = cls(
            *(module.input_size, module.hidden_size),
            bias=bool(biases),
            batch_first=module.batch_first,
            backend=backend,
            device=weight_ih.device,
            dtype=weight_ih.dtype,
        )
        _copy_weights(layer, weight_ih, weight_hh, biases, gate_order="ifgo")
        return layer


class LSTMCell(Recurrent):
    """One step of an LSTM, or, with `unroll`, a whole sequence in one kernel.

    Args:
        input_size: features of the input.
        hidden_size: features of the output.
        bias: whether the gates have a bias.
        backend: as in `xk.lstm`.

    forward(x, state=None) -> (h, c):
        x: (B, input_size), or (input_size,) without a batch axis.
        state: (h, c), each (B, hidden_size) or (hidden_size,); None is zeros.
        h is in x's dtype; c is float32, float64 for float64 x.

    State dict: as `LSTM` with num_heads=1, so that either loads the other's.
    `LSTMCell.from_linears` takes over a hand-written cell. Initialisation is nn.LSTMCell's: uniform
    within 1 / sqrt(hidden_size).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            *(input_size, hidden_size, 1), bias=bias, backend=backend, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        _uniform_like_torch(self)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step; see the class for shapes."""
        check_is_tensor("LSTMCell", "x", x)
        if x.dim() not in (1, 2):
            raise ValueError(
                f"LSTMCell: x must be (B, input_size) or (input_size,), got {tuple(x.shape)}"
            )
        if x.dim() == 1:
            lifted = None if state is None else [part.unsqueeze(0) for part in _pair(state)]
            h_BE, c_BE = self(x.unsqueeze(0), lifted)
            return h_BE.squeeze(0), c_BE.squeeze(0)
        h_BTE, (_, c_BE) = self.unroll(x.unsqueeze(1), state)
        return h_BTE.squeeze(1), c_BE

    def unroll(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All steps of x (B, T, input_size) in one kernel.

        Returns:
            h (B, T, hidden_size) in x's dtype, and the last (h, c), each (B, hidden_size), float32
            (float64 for float64 x).
        """
        check_is_tensor("LSTMCell.unroll", "x", x)
        if x.dim() != 3:
            raise ValueError(f"LSTMCell.unroll: x must be (B, T, input_size), got {tuple(x.shape)}")
        x_BTGHD = self.gates(x)
        if state is not None:
            h_BE, c_BE = _pair(state)
            state = self._heads(h_BE), self._heads(c_BE)
        h_BTHD, (h_BHD, c_BHD) = lstm(
            x_BTGHD, self.weight_hh, self.bias, state, backend=self.backend
        )
        return h_BTHD.squeeze(2), (h_BHD.squeeze(1), c_BHD.squeeze(1))

    @staticmethod
    def _heads(part: Tensor) -> Tensor:
        """(B, hidden_size) -> (B, 1, D)"""
        if part.dim() != 2:
            raise ValueError(
                f"LSTMCell: h and c must be (B, hidden_size) like x, got {tuple(part.shape)}"
            )
        return part.unsqueeze(1)

    @classmethod
    def from_linears(
        cls,
        input_linear: nn.Linear,
        hidden_linear: nn.Linear,
        gate_order: str,
        *,
        backend: str = "auto",
    ) -> LSTMCell:
        """A cell with a copy of the weights of a hand-written one.

        Args:
            input_linear: Linear(input_size, 4 * hidden_size).
            hidden_linear: Linear(hidden_size, 4 * hidden_size). Either, both or neither has a bias.
            gate_order: order of the four gates in their outputs: "ifgo" as in torch.nn, "ifog", or
                any other; g is the candidate, the one with the tanh.
        """
        name = "LSTMCell.from_linears"
        for argument, linear in (("input_linear", input_linear), ("hidden_linear", hidden_linear)):
            if not isinstance(linear, nn.Linear):
                raise TypeError(
                    f"{name}: {argument} must be a torch.nn.Linear, got {type(linear).__name__}"
                )
        hidden_size = hidden_linear.in_features
        if not isinstance(gate_order, str) or sorted(gate_order) != sorted("ifgo"):
            raise ValueError(
                f"{name}: gate_order must be the letters i f g o in some order, got {gate_order!r}"
            )
        for argument, linear in (("input_linear", input_linear), ("hidden_linear", hidden_linear)):
            if linear.out_features != 4 * hidden_size:
                raise ValueError(
                    f"{name}: {argument} must have 4 * hidden_size = {4 * hidden_size} outputs,"
                    f" got {linear.out_features}"
                )
        biases = [m.bias for m in (input_linear, hidden_linear) if m.bias is not None]
        cell = cls(
            *(input_linear.in_features, hidden_size),
            bias=bool(biases),
            backend=backend,
            device=input_linear.weight.device,
            dtype=input_linear.weight.dtype,
        )
        _copy_weights(cell, input_linear.weight, hidden_linear.weight, biases, gate_order)
        return cell


def _pair(state: Sequence[Tensor]) -> Sequence[Tensor]:
    """LSTMCell's (h, c), checked to be two tensors."""
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"LSTMCell: state must be (h, c), got {type(state).__name__}")
    if len(state) != 2:
        raise ValueError(f"LSTMCell: state must be (h, c), got {len(state)} tensors")
    for field, part in zip(LSTMState._fields, state, strict=True):
        check_is_tensor("LSTMCell", f"state.{field}", part)
    return state


def _uniform_like_torch(layer: Recurrent) -> None:
    bound = 1 / math.sqrt(layer.hidden_size)
    nn.init.uniform_(layer.weight_ih, -bound, bound)
    recurrent_bound = 1 / math.sqrt(layer.head_dim)
    nn.init.uniform_(layer.weight_hh, -recurrent_bound, recurrent_bound)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound)


@torch.no_grad()
def _copy_weights(
    layer: Recurrent,
    weight_ih: Tensor,
    weight_hh: Tensor,
    biases: Sequence[Tensor],
    gate_order: str,
) -> None:
    """Copies dense weights whose rows hold the gates in `gate_order` (g is our z)."""
    rows = [gate_order.index(gate.replace("z", "g")) for gate in GATES]

    def reorder(tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.unflatten(0, (len(GATES), -1))[rows].reshape(like.shape)

    layer.weight_ih.copy_(reorder(weight_ih, layer.weight_ih))
    layer.weight_hh.copy_(reorder(weight_hh, layer.weight_hh))
    if layer.bias is not None:
        layer.bias.copy_(reorder(torch.stack(tuple(biases)).sum(0), layer.bias))
