"""What the recurrent layers share: their parameters, and the way from an input to its gates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_is_tensor, check_layer_sizes
from ..backends import Backend
from ..cells import GATES


class Recurrent(nn.Module):
    """Parameters of an input projection to the four gates and of a block-diagonal recurrence.

    Rows of `weight_ih` are gate-major, then head-major; gates in the order i f z o.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_heads: int,
        bias: bool,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        name = type(self).__name__
        check_layer_sizes(name, input_size, hidden_size, num_heads)
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        self.head_dim = hidden_size // num_heads
        self.backend = Backend.parse(name, backend).value
        G, H, D = len(GATES), num_heads, self.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_ih = parameter(G * hidden_size, input_size)
        self.weight_hh = parameter(G, H, D, D)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", parameter(G, H, D) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def gates(self, x: Tensor) -> Tensor:
        """(..., input_size) -> (..., 4, H, D): W x, without the bias."""
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__}: x must be (..., input_size) = (..., {self.input_size}),"
                f" got {tuple(x.shape)}"
            )
        # view, not unflatten: in a single step its wrapper costs as much as the recurrence.
        return F.linear(x, self.weight_ih).view(*x.shape[:-1], *self.weight_hh.shape[:3])

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"{key}={value!r}" for key, value in self._options().items()]
        return ", ".join(parts)

    def _options(self) -> dict[str, Any]:
        """Arguments that `repr` shows: those that differ from the usual."""
        shown: dict[str, Any] = {"num_heads": self.num_heads} if self.num_heads != 1 else {}
        if self.bias is None:
            shown["bias"] = False
        if self.backend != "auto":
            shown["backend"] = self.backend
        return shown


class SequenceLayer(Recurrent):
    """A `Recurrent` that runs over whole sequences."""

    def __init__(
        self, input_size: int, hidden_size: int, num_heads: int, batch_first: bool, **options: Any
    ):
        super().__init__(input_size, hidden_size, num_heads, **options)
        self.batch_first = batch_first

    def recurrence(
        self, x_BTGHD: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Runs the layer over sequences; see the class for shapes."""
        check_is_tensor(type(self).__name__, "x", x)
        unbatched = x.dim() == 2
        if x.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: x must be {self._layout()} or (T, input_size),"
                f" got {tuple(x.shape)}"
            )
        gates = self.gates(x)
        # Packed sequences bring one state each, whether or not x has the batch axis of size 1.
        lift_state = unbatched and cu_seqlens is None
        if unbatched:
            gates = gates.unsqueeze(0)
        elif not self.batch_first:
            gates = gates.transpose(0, 1)
        if lift_state and isinstance(state, (tuple, list)):
            state = tuple(part.unsqueeze(0) if isinstance(part, Tensor) else part for part in state)
        h_BTHD, last = self.recurrence(gates, state, cu_seqlens)
        h = h_BTHD.flatten(2)
        if lift_state:
            last = type(last)(*(part.squeeze(0) for part in last))
        if unbatched:
            h = h.squeeze(0)
        elif not self.batch_first:
            h = h.transpose(0, 1)
        return h, last

    def _layout(self) -> str:
        return "(B, T, input_size)" if self.batch_first else "(T, B, input_size)"

    def _options(self) -> dict[str, Any]:
        return super()._options() | ({} if self.batch_first else {"batch_first": False})
