"""The mLSTM layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_is_number, check_is_positive, check_is_tensor, check_layer_sizes
from ..backends import Backend
from ..cells import MLSTMState, compute_dtype, no_autocast
from ..ops.mlstm.api import mlstm
from ..ops.mlstm.arguments import check_options
from ..ops.mlstm_step.api import mlstm_step

# What `repr` does not show, being the usual.
_USUAL = {
    "qk_ratio": 0.5,
    "input_gate": "exp",
    "normalizer": "max",
    "soft_cap": 15.0,
    "chunk_size": None,
    "batch_first": True,
    "bias": False,
    "num_blocks": None,
    "backend": "auto",
}


class MLSTM(nn.Module):
    """mLSTM over sequences, as in xLSTM-7B: projections, `xk.mlstm`, a norm per head, output gate.

    y = W_out (sigmoid(W_o x) * norm(h)), gates i and f soft-capped: cap tanh((W x + b) / cap), in
    float32 at least, whatever dtype the layer has and autocast says.

    Args:
        input_size: features of the input.
        hidden_size: features of values, memory readout and output; a multiple of `num_heads`.
        num_heads: heads, each with a matrix memory of its own.
        qk_ratio: features of queries and of keys, as a share of `hidden_size`.
        input_gate, normalizer, chunk_size, backend: as in `xk.mlstm`.
        soft_cap: bound on the pre-activations of both gates; None for no bound.
        batch_first: True: x and y are (B, T, ...); False: (T, B, ...).
        bias: whether projections other than the gates' have a bias.
        num_blocks: of the model that the layer is part of, for the initialisation of `out`.

    forward(x, state=None, cu_seqlens=None) -> (y, state):
        x: (B, T, input_size), or (T, input_size) for one sequence without a batch axis.
        state: MLSTMState(c (B, H, K, V), n (B, H, K), m (B, H)), without B for one sequence; None
            is zeros. Pass the returned state to go on.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences; x is then (1, T, input_size)
            or (T, input_size), and states have S rows.
        y: (B, T, hidden_size) or (T, hidden_size).

    step(x, state=None, inplace=False) -> (y, state): one token, x (B, input_size), y (B,
        hidden_size). In place, as `xk.mlstm_step`: the next state takes the storage of `state`.

    State dict, rows of every projection head-major:
        qkvo.weight  (2 H K + 2 H V, input_size)  queries, keys, values, output gate
        gates.weight (2 H, input_size)            input gates, forget gates
        gates.bias   (2 H)
        norm.weight  (H V)                        of each head's layer norm
        out.weight   (H V, H V)                   rows are outputs
        qkvo.bias, out.bias                       absent with bias=False

    Source: xLSTM-7B, arXiv 2503.13427, section 2, section 3.2 and appendix A. Initialisation as
    there (section 3.2, appendix C.2) and in the code that trained it: weights of all three gates
    zero, input gates' bias -10, forget gates' from 3 (first head) to 6 (last), other biases zero,
    norm one. q, k and v: normal with variance 2 / (5 input_size) (arXiv 1910.05895). out: normal
    with standard deviation 2 / (num_blocks sqrt(hidden_size)), so that a deep model's residuals
    start small; without `num_blocks` as the others.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_heads: int,
        *,
        qk_ratio: float = 0.5,
        input_gate: str = "exp",
        normalizer: str = "max",
        soft_cap: float | None = 15.0,
        chunk_size: int | None = None,
        batch_first: bool = True,
        bias: bool = False,
        num_blocks: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(input_size, hidden_size, num_heads, qk_ratio, soft_cap)
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        self.qk_ratio, self.soft_cap, self.bias = qk_ratio, soft_cap, bias
        self.input_gate, self.normalizer, self.chunk_size = input_gate, normalizer, chunk_size
        self.batch_first, self.backend = batch_first, Backend.parse("MLSTM", backend).value
        self.head_dim = hidden_size // num_heads
        self.qk_dim = round(hidden_size * qk_ratio) // num_heads
        check_options("MLSTM", input_gate, normalizer, chunk_size)
        if num_blocks is not None:
            check_is_positive("MLSTM", "num_blocks", num_blocks)
        self.num_blocks = num_blocks
        made: Any = {"device": device, "dtype": dtype}
        sizes = 2 * num_heads * self.qk_dim + 2 * hidden_size
        self.qkvo = nn.Linear(input_size, sizes, bias, **made)
        self.gates = GateProjection(input_size, 2 * num_heads, **made)
        self.norm = HeadNorm(num_heads, self.head_dim, **made)
        self.out = nn.Linear(hidden_size, hidden_size, bias, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        small_init(self.qkvo)
        nn.init.zeros_(self.qkvo.weight[-self.hidden_size :])  # output gates
        residual_init(self.out, self.hidden_size, self.num_blocks)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.gates.weight)
        i_H, f_H = self.gates.bias.chunk(2)
        i_H.fill_(-10.0)
        f_H.copy_(torch.linspace(3.0, 6.0, self.num_heads, device=f_H.device))

    def forward(
        self,
        x: Tensor,
        state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MLSTMState]:
        """Runs the layer over sequences; see the class for shapes."""
        layout = "(B, T, input_size)" if self.batch_first else "(T, B, input_size)"
        self._check_input(x, (2, 3), f"{layout} or (T, input_size)")
        unbatched = x.dim() == 2
        # Packed sequences bring one state each, whether or not x has the batch axis of size 1.
        lift_state = unbatched and cu_seqlens is None
        if unbatched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        given: Any = state
        if lift_state and isinstance(state, (tuple, list)):
            given = tuple(p.unsqueeze(0) if isinstance(p, Tensor) else p for p in state)
        inputs, o = self._project(x)
        options = self._options() | {"chunk_size": self.chunk_size, "cu_seqlens": cu_seqlens}
        h, last = mlstm(**inputs, state=given, **options)
        y = self._read_out(h, o)
        if lift_state:
            last = MLSTMState(*(part.squeeze(0) for part in last))
        if unbatched:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, last

    def step(
        self,
        x: Tensor,
        state: MLSTMState | tuple[Tensor, Tensor, Tensor] | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, MLSTMState]:
        """One token: x (B, input_size) -> y (B, hidden_size), and the next state."""
        self._check_input(x, (2,), "(B, input_size)")
        inputs, o = self._project(x)
        given: Any = self._zeros(x) if state is None else state
        h, last = mlstm_step(**inputs, state=given, inplace=inplace, **self._options())
        return self._read_out(h, o), last

    def _project(self, x: Tensor) -> tuple[dict[str, Any], Tensor]:
        """q, k, v, i, f by name, and the output gate's pre-activations (..., H V)."""
        H, K, V = self.num_heads, self.qk_dim, self.head_dim
        q, k, v, o = self.qkvo(x).split([H * K, H * K, H * V, H * V], dim=-1)
        gates = self.gates(x)
        if self.soft_cap is not None:
            gates = self.soft_cap * torch.tanh(gates / self.soft_cap)
        i, f = gates.chunk(2, dim=-1)
        heads = {name: x.unflatten(-1, (H, -1)) for name, x in (("q", q), ("k", k), ("v", v))}
        return heads | {"i": i, "f": f}, o

    def _read_out(self, h: Tensor, o: Tensor) -> Tensor:
        return self.out(torch.sigmoid(o) * self.norm(h).flatten(-2))

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("input_gate", "normalizer", "backend")}

    def _zeros(self, x_BE: Tensor) -> MLSTMState:
        H, K, V = self.num_heads, self.qk_dim, self.head_dim
        dtype = compute_dtype(self.qkvo.weight.dtype)
        shapes = ((H, K, V), (H, K), (H,))
        return MLSTMState(*(x_BE.new_zeros(x_BE.shape[0], *s, dtype=dtype) for s in shapes))

    def _check_input(self, x: Tensor, dims: tuple[int, ...], layout: str) -> None:
        check_is_tensor("MLSTM", "x", x)
        if x.dim() not in dims:
            raise ValueError(f"MLSTM: x must be {layout}, got {tuple(x.shape)}")
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"MLSTM: x must be (..., input_size) = (..., {self.input_size}),"
                f" got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        shown = [f"{self.input_size}, {self.hidden_size}, {self.num_heads}"]
        given = {key: getattr(self, key) for key in _USUAL}
        return ", ".join(shown + [f"{k}={v!r}" for k, v in given.items() if v != _USUAL[k]])


class GateProjection(nn.Linear):
    """A linear layer (..., in_features) -> (..., out_features) in float32, float64 for float64 x,
    whatever dtype it has and autocast says.

    Gates are exponents: near -10, where input gates start, bfloat16 has steps of 1/16.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        with no_autocast(x.device):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class HeadNorm(nn.Module):
    """Layer norm of each head's values, (..., H, V), with a weight for each."""

    def __init__(self, num_heads: int, head_dim: int, **made: Any):
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, 1e-6
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim, **made))

    def forward(self, h: Tensor) -> Tensor:
        weight_HV = self.weight.view(self.num_heads, self.head_dim)
        return F.layer_norm(h, (self.head_dim,), eps=self.eps) * weight_HV.to(h.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}"


def small_init(linear: nn.Linear) -> None:
    _normal_init(linear, math.sqrt(2 / (5 * linear.in_features)))


def residual_init(linear: nn.Linear, features: int, num_blocks: int | None) -> None:
    """Of a projection whose output is added to a residual stream of `features`."""
    if num_blocks is None:
        small_init(linear)
    else:
        _normal_init(linear, 2 / (num_blocks * math.sqrt(features)))


@torch.no_grad()
def _normal_init(linear: nn.Linear, std: float) -> None:
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _check_sizes(
    input_size: int, hidden_size: int, num_heads: int, qk_ratio: float, soft_cap: float | None
) -> None:
    check_layer_sizes("MLSTM", input_size, hidden_size, num_heads)
    check_is_number("MLSTM", "qk_ratio", qk_ratio)
    if not 0 < qk_ratio < math.inf:
        raise ValueError(f"MLSTM: qk_ratio must be above 0 and finite, got {qk_ratio}")
    features = round(hidden_size * qk_ratio)
    if features < 1 or features % num_heads:
        raise ValueError(
            "MLSTM: qk_ratio must make hidden_size * qk_ratio a multiple of num_heads ="
            f" {num_heads}, got {qk_ratio}, which makes {features}"
        )
    if soft_cap is not None:
        check_is_number("MLSTM", "soft_cap", soft_cap)
        if not soft_cap > 0:
            raise ValueError(f"MLSTM: soft_cap must be above 0 or None, got {soft_cap}")
