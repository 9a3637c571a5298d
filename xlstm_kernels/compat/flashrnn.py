"""The public names of the package `flashrnn`, on `xk.lstm` and `xk.slstm`.

    from xlstm_kernels.compat.flashrnn import flashrnn  # was: from flashrnn import flashrnn

Arguments and layouts are that package's: Wx (B, T, 4, N, D), R (4, N, D, D) [gate, head, out, in],
b (4, N, D), states (S, B, 1, N, D), gates in the order i f z o. What differs:

- Of all steps h alone is returned, as (1, B, T, N, D): `states[0]` is what it is there, `states[1]`
  an IndexError. `every_state=True` returns all of them, (S, B, T, N, D) in the dtype of Wx, by one
  call of the kernel a step. The last states are float32 (float64 for float64 inputs).
- function="gru" and "elman" have no kernel here, and cells have no constants.
- Any B, T, N, D; `backend` and `dtype` are taken and do nothing: inputs are not cast.
- Gradients are exact for c, n and m too. `gradient_recurrent_clipval` bounds the gradient alone;
  there it bounds h as well.
- sLSTM looks for n = 0 element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from ..ops.recurrence.api import lstm, slstm

FUNCTIONS = ("lstm", "slstm")
LAYOUTS = {"output_shape": "SBTHD", "recurrent_shape": "GHDP", "bias_shape": "GHD"}
BACKENDS = ("vanilla", "vanilla_fwbw", "cuda", "cuda_fused", "triton_fused")


@dataclass
class FlashRNNConfig:
    """The package's fields in its order, but for those that it keeps to itself. What only chooses
    or tunes its kernels does nothing here."""

    backend: str = "cuda_fused"
    function: str = "lstm"
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    constants: dict[str, float] | None = None
    simple_agg: bool = True
    hidden_dim: int = -1
    num_heads: int = -1
    head_dim: int = -1
    num_states: int = 4
    num_gates_r: int = 4
    num_gates_w: int = 4
    num_gates_i: int = 4
    num_gates_t: int = 4
    batch_size: int = 8
    input_shape: str = "BTGHD"
    output_shape: str = "SBTHD"
    recurrent_shape: str = "GHDP"
    bias_shape: str = "GHD"
    dtype: str = "bfloat16"
    dtype_acc: str | None = "float32"
    dtype_b: str | None = None
    dtype_r: str | None = None
    dtype_w: str | None = None
    dtype_g: str | None = None
    dtype_s: str | None = None
    dtype_a: str | None = None
    enable_automatic_mixed_precision: bool = True
    trainable_r: Sequence[bool] | bool = True
    trainable_b: Sequence[bool] | bool = True
    initial_val: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        _check_names(self.function, self.backend)
        if self.gradient_recurrent_cut:
            raise NotImplementedError("flashrnn: gradient_recurrent_cut must be False, got True")
        if self.forward_clipval is not None:
            raise NotImplementedError(
                f"flashrnn: forward_clipval must be None, got {self.forward_clipval}"
            )
        if self.constants:
            raise NotImplementedError(f"flashrnn: constants must be empty, got {self.constants}")
        self.num_states = CELLS[self.function].states
        if self.input_shape not in ("BTGHD", "TBGHD"):
            raise ValueError(
                f"flashrnn: input_shape must be 'BTGHD' or 'TBGHD', got {self.input_shape!r}"
            )
        for field, letters in LAYOUTS.items():
            if sorted(getattr(self, field)) != sorted(letters):
                raise ValueError(
                    f"flashrnn: {field} must be the letters {letters} in some order, got"
                    f" {getattr(self, field)!r}"
                )


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str = "lstm",
    config: FlashRNNConfig | None = None,
    backend: str = "cuda_fused",
    dtype: str = "bfloat16",
    *,
    every_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """LSTM or sLSTM over a sequence: h of all steps (1, B, T, N, D), last states (S, B, 1, N, D).

    With `every_state`, which the package does not have, the first is all states of all steps,
    (S, B, T, N, D), as it is there: by one call of the kernel a step, some six times slower.

    Example:
        >>> import torch
        >>> from xlstm_kernels.compat.flashrnn import flashrnn
        >>> Wx, R, b = torch.randn(2, 7, 4, 3, 8), torch.randn(4, 3, 8, 8), torch.zeros(4, 3, 8)
        >>> h, last = flashrnn(Wx, R, b, function="slstm")
        >>> h[0].shape, last.shape
        (torch.Size([2, 7, 3, 8]), torch.Size([4, 2, 1, 3, 8]))
    """
    if config is None:
        config = FlashRNNConfig(function=function, backend=backend)
    x_BTGHD = Wx if config.input_shape == "BTGHD" else Wx.transpose(0, 1)
    r_GHDP = _in_order("R", R, config.recurrent_shape, "GHDP")
    b_GHD = _in_order("b", b, config.bias_shape, "GHD")
    given = _initial(config, x_BTGHD, states)
    if every_state:
        steps_T = []
        for x_B1GHD in x_BTGHD.split(1, dim=1):
            _, given = _run(config, x_B1GHD, r_GHDP, b_GHD, given)
            steps_T.append(torch.stack(given).to(x_BTGHD.dtype))
        # An empty sequence is split into one step of no length.
        steps_SBTHD, last = torch.stack(steps_T, dim=2)[:, :, : x_BTGHD.shape[1]], given
    else:
        h_BTHD, last = _run(config, x_BTGHD, r_GHDP, b_GHD, given)
        steps_SBTHD = h_BTHD.unsqueeze(0)
    last_SBTHD = torch.stack(tuple(last)).unsqueeze(2)
    order = "SBTHD", config.output_shape
    return _in_order("h", steps_SBTHD, *order), _in_order("states", last_SBTHD, *order)


def _in_order(name: str, tensor: Tensor, letters: str, wanted: str) -> Tensor:
    if letters == wanted:  # of any form: the operation says best what does not fit
        return tensor
    if tensor.dim() != len(letters):
        raise ValueError(f"flashrnn: {name} must be {letters}, got {tuple(tensor.shape)}")
    return tensor.permute([letters.index(letter) for letter in wanted])


def _run(config: FlashRNNConfig, x: Tensor, r: Tensor, b: Tensor, given: Any) -> Any:
    """h of all steps, and the last states."""
    clip_grad = config.gradient_recurrent_clipval
    if config.function == "slstm":
        return slstm(x, r, b, given, n_floor=1.0, clip_grad=clip_grad)
    if clip_grad is not None:
        raise NotImplementedError(
            "flashrnn: gradient_recurrent_clipval must be None with function='lstm', got"
            f" {clip_grad}"
        )
    return lstm(x, r, b, given)


def _initial(config: FlashRNNConfig, x_BTGHD: Tensor, states: Tensor | None) -> Any:
    """The initial states, each (B, N, D), or None for zeros."""
    count = CELLS[config.function].states
    if states is not None:
        states_SBTHD = _in_order("states", states, config.output_shape, "SBTHD")
        if tuple(states_SBTHD.shape[:3:2]) != (count, 1):
            raise ValueError(
                f"flashrnn: states must have S = {count} and T = 1 with function="
                f"{config.function!r}, got {tuple(states.shape)} as {config.output_shape}"
            )
        return states_SBTHD.squeeze(2).unbind(0)
    value = config.initial_val
    values = [value] * count if isinstance(value, (int, float)) else list(value)
    if not any(values):
        return None
    shape = (x_BTGHD.shape[0], *x_BTGHD.shape[3:])
    return tuple(x_BTGHD.new_full(shape, float(value)) for value in values[:count])


def _check_names(function: str, backend: str) -> None:
    if function in ("gru", "elman"):
        raise NotImplementedError(f"flashrnn: no kernel for function={function!r}")
    for argument, value, known in (
        ("function", function, FUNCTIONS),
        ("backend", backend, BACKENDS),
    ):
        if value not in known:
            raise ValueError(f"flashrnn: {argument} must be one of {known}, got {value!r}")
