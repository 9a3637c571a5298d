"""The cells of the package `xlstm` (NX-AI): its mLSTM, its sLSTM and LSTM in both weight layouts.

The models of its `xlstm_large` call `mlstm_kernels`, and are replaced as layers of that.

The package keeps recurrent weights and biases in one order for its CUDA kernel and in another for
plain torch; the class says which, as the biases have the same shape in both. What differs from it:
states stay float32 for half-precision inputs, `step` returns the new state (the package returns the
one it was given), n = 0 is looked for element by element, and gradients are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cells import CELLS
from ..ops.mlstm_step.api import mlstm_step
from ..ops.recurrence.api import lstm, slstm
from .mlstm_kernels import run_head_first
from .swap import Found, Swap, Swapped, fused_backend, no_kernel, swapped_class


def by_gate(kernel: Tensor, bias: Tensor, H: int, D: int, cuda: bool) -> tuple[Tensor, Tensor]:
    """r (4, H, D, D) [gate, head, out, in] and b (4, H, D), as views.

    The package's orders: kernel (H, in, 4, out) and bias (H, 4, D) with `cuda`, else (H, 4, out,
    in) and (4, H, D).
    """
    if cuda:
        return kernel.view(H, D, 4, D).permute(2, 0, 3, 1), bias.view(H, 4, D).transpose(0, 1)
    return kernel.view(H, 4, D, D).transpose(0, 1), bias.view(4, H, D)


def run_cell(
    function: str,
    x_BTGHD: Tensor,
    weights: tuple[Tensor, Tensor],
    states: Tensor | None,
    clip_grad: float | None = None,
) -> tuple[Tensor, Tensor]:
    """h (B, T, H, D) and the last states (S, B, H D), from states (S, B, H D) or None."""
    H, D = x_BTGHD.shape[3:]
    given: Any = None if states is None else states.unflatten(-1, (H, D)).unbind(0)
    last: Any
    if function == "lstm":
        h, last = lstm(x_BTGHD, *weights, given)
    else:
        h, last = slstm(x_BTGHD, *weights, given, clip_grad=clip_grad)
    return h, torch.stack(tuple(last)).flatten(2)


class FusedSLSTMCell(Swapped):
    """`sLSTMCell_vanilla` or `sLSTMCell_cuda` over a sequence, in one kernel."""

    config: Any
    _recurrent_kernel: Tensor
    _bias: Tensor
    _check_input: Any
    _permute_output: Any

    def forward(
        self, input: Tensor, state: Tensor | None = None, lengths: Any = None
    ) -> tuple[Tensor, Tensor]:
        if not input.is_cpu:
            return self.replaced.forward(self, input, state, lengths)
        self._check_input(input)
        config = self.config
        H, D = config.num_heads, config.head_dim
        x = input.unflatten(-1, (4, H, D))
        if config.input_shape == "SBGNH":
            x = x.transpose(0, 1)
        cuda = self.replaced.__name__ == "sLSTMCell_cuda"
        weights = by_gate(self._recurrent_kernel, self._bias, H, D, cuda)
        clip_grad = config.gradient_recurrent_clipval if cuda else None
        h_BTHD, last = run_cell(config.function, x, weights, state, clip_grad)
        return self._permute_output(h_BTHD.flatten(2).transpose(0, 1)), last

    def step(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if not input.is_cpu:
            return self.replaced.step(self, input, state)
        return self.forward(input, state)


class FusedMLSTMCell(Swapped):
    """`mLSTMCell`: its two functions are ours, by properties, which stand before its attributes."""

    igate: nn.Linear
    backend_fn = property(lambda cell: cell._choose("backend_fn", parallel))
    backend_fn_step = property(lambda cell: cell._choose("backend_fn_step", step))

    def _choose(self, name: str, ours: Any) -> Any:
        return ours if self.igate.weight.is_cpu else vars(self)[name]


def parallel(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    lower_triangular_matrix: Tensor | None = None,
    eps: float = 1e-6,
    **ignored: Any,
) -> Tensor:
    """queries, keys, values (B, NH, S, D), gates (B, NH, S, 1) -> h (B, NH, S, D)."""
    gates = igate_preact.squeeze(-1), fgate_preact.squeeze(-1)
    return run_head_first(queries, keys, values, *gates, (None, None, None), eps=eps)[0]


def step(
    c_state: Tensor,
    n_state: Tensor,
    m_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    eps: float = 1e-6,
    **ignored: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q, k, v (B, NH, 1, D), gates and m (B, NH, 1, 1), c (B, NH, D, D), n (B, NH, D, 1).

    The package divides keys, not queries, by sqrt(D), so that its states are smaller by that.
    """
    BH = q.shape[:2]
    k = k * k.shape[-1] ** -0.5
    token = q.squeeze(2), k.squeeze(2), v.squeeze(2), igate_preact.view(BH), fgate_preact.view(BH)
    state = c_state, n_state.squeeze(-1), m_state.view(BH)
    h, (c, n, m) = mlstm_step(*token, state, scale=1.0, eps=eps)
    return h.unsqueeze(2), (c, n.unsqueeze(-1), m.view(*BH, 1, 1))


KNOWN = (
    "xlstm.blocks.mlstm.cell.mLSTMCell",
    "xlstm.blocks.slstm.cell.sLSTMCell_cuda",
    "xlstm.blocks.slstm.cell.sLSTMCell_vanilla",
)


def find(layer: nn.Module) -> Found:
    name = type(layer).__name__
    weight = next(layer.parameters(), torch.empty(0))
    if name == "mLSTMCell":
        backend = fused_backend("mlstm", weight)
        if backend is None:
            return no_kernel("mlstm", weight)
        return Swap(swapped_class(FusedMLSTMCell, type(layer)), backend)
    config: Any = layer.config
    if config.function not in ("slstm", "lstm"):
        return f"no kernel for function={config.function!r}"
    if config.num_states != CELLS[config.function].states:
        return f"num_states={config.num_states} is not that of function={config.function!r}"
    if name == "sLSTMCell_cuda" and config.gradient_recurrent_cut:
        return "gradient_recurrent_cut=True: our kernels do not cut the gradient"
    clip_grad = config.gradient_recurrent_clipval
    if name == "sLSTMCell_cuda" and config.function == "lstm" and clip_grad is not None:
        return f"gradient_recurrent_clipval={clip_grad}: our kernel for lstm bounds no gradient"
    backend = fused_backend("recurrence", weight, weight, config.function)
    if backend is None:
        return no_kernel(config.function, weight)
    return Swap(swapped_class(FusedSLSTMCell, type(layer)), backend)
