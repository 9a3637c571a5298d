"""What we are compared with: plain torch, and others' packages, on the same inputs, for the same
results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import xlstm_kernels as xk

from .packages import TRANSFORMERS_XLSTM, load
from .problem import FORWARD, Bound, Case, Tensors, UnavailableError, Variant

Bind = Callable[[Case, Tensors, str], Bound]


def eager_loop(bind: Bind) -> Variant:
    """The cell's equations in eager torch, a Python loop over time."""
    return Variant("eager", lambda case, tensors: bind(case, tensors, "reference"))


def compiled_step() -> Variant:
    """One step of the eager loop under `torch.compile`, called in a loop over time.

    Compiling the whole loop unrolls it: minutes for 128 steps, and again for every other T.
    """
    return Variant("torch.compile", _bind_compiled_step, compiles=True)


def _bind_compiled_step(case: Case, tensors: Tensors) -> Bound:
    op = getattr(xk, case.op)
    State = {"slstm": xk.SLSTMState, "lstm": xk.LSTMState}[case.op]
    x, r, b = tensors["x"], tensors["r"], tensors["b"]
    zeros = x.new_zeros(x.shape[0], *x.shape[3:])
    start = State(*(tensors.get(f"state_{name}", zeros) for name in State._fields))

    def one_step(x_B1GHD: Tensor, r: Tensor, b: Tensor, state: tuple[Tensor, ...]):
        return op(x_B1GHD, r, b, state, backend="reference")

    compiled = torch.compile(one_step, dynamic=False)

    def call() -> tuple[Tensor, ...]:
        state, h_T = start, []
        for x_B1GHD in x.split(1, dim=1):
            h, state = compiled(x_B1GHD, r, b, state)
            h_T.append(h)
        return (torch.cat(h_T, dim=1), *state)

    return Bound(call, {name: tensors[name] for name in case.wrt})


def nn_lstm() -> Variant:
    """`torch.nn.LSTM`, one layer, batch first."""
    return Variant("nn.LSTM", _bind_nn_lstm)


def _bind_nn_lstm(case: Case, tensors: Tensors) -> Bound:
    input_BTE = tensors["input"]
    module = torch.nn.LSTM(input_BTE.shape[2], tensors["w_hh"].shape[1], batch_first=True)
    parameters = {
        "w_ih": module.weight_ih_l0,
        "w_hh": module.weight_hh_l0,
        "b_ih": module.bias_ih_l0,
        "b_hh": module.bias_hh_l0,
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    module.requires_grad_(case.direction != FORWARD)

    def call() -> tuple[Tensor, ...]:
        h, (last_h, last_c) = module(input_BTE)
        return h, last_h[0], last_c[0]

    return Bound(call, {"input": input_BTE, **parameters})


def kl_div(divergence: str, temperature: float) -> tuple[Variant, ...]:
    """`F.kl_div` of log_softmax and softmax, or the sums of another divergence, times temperature
    squared as ours is; eager and under `torch.compile`."""
    return _eager_and_compiled(_kl_div(divergence, temperature), ("student", "teacher"))


def topk_kl_div() -> tuple[Variant, ...]:
    """log_softmax, gathered words, and a tail of what they leave of 1."""
    return _eager_and_compiled(tail_kl_div, ("student", "logprobs", "ids"))


def _eager_and_compiled(loss: Callable[..., Tensor], names: Sequence[str]) -> tuple[Variant, ...]:
    def bind(compiles: bool, case: Case, tensors: Tensors) -> Bound:
        function = torch.compile(loss, dynamic=False) if compiles else loss
        arguments = [tensors[name] for name in names]
        return Bound(lambda: (function(*arguments),), {"student": tensors["student"]})

    return (
        Variant("eager", partial(bind, False)),
        Variant("torch.compile", partial(bind, True), compiles=True),
    )


def _kl_div(divergence: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    def kl_div(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, -1)
        if divergence == "forward":
            p = F.softmax(teacher / temperature, -1)
            loss = F.kl_div(log_q, p, reduction="batchmean")
        elif divergence == "tv":
            p = F.softmax(teacher / temperature, -1)
            loss = (p - log_q.exp()).abs().sum() / (2 * len(student))
        elif divergence == "js":
            log_p = F.log_softmax(teacher / temperature, -1)
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
            loss = (of_p + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2
        else:
            raise ValueError(f"no peer for divergence {divergence!r}")
        return loss * temperature**2

    return kl_div


def tail_kl_div(student: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
    log_q = F.log_softmax(student, -1).gather(-1, ids)
    tail_p = (1 - logprobs.exp().sum(-1)).clamp_min(1e-8)
    tail_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-8)
    inside = (logprobs.exp() * (logprobs - log_q)).sum(-1)
    return (inside + tail_p * (tail_p.log() - tail_q.log())).mean()


Find = Callable[[], Callable[..., Any]]
# Functions of q, k, v, i, f with heads before time.
SEQUENCES: dict[str, Find] = {
    "transformers": lambda: _transformers().mlstm_chunkwise_native_autograd,
    "mlstm_kernels": lambda: load(_MLSTM_KERNELS).get_mlstm_kernel("chunkwise--native_autograd"),
}
# With the gradient that its GPU kernels compute as well.
OWN_BACKWARD: dict[str, Find] = {
    "mlstm_kernels custbw": lambda: load(_MLSTM_KERNELS).get_mlstm_kernel(
        "chunkwise--native_custbw"
    ),
}
# Functions of q, k, v, i, f, c, n, m.
STEPS: dict[str, Find] = {
    "transformers": lambda: _transformers().mlstm_recurrent_step_native,
    "mlstm_kernels": lambda: load(_MLSTM_KERNELS).get_mlstm_step_kernel("native"),
}
_MLSTM_KERNELS = "mlstm_kernels.torch"


def _transformers() -> ModuleType:
    module = load(TRANSFORMERS_XLSTM)
    if module.external_xlstm:
        raise UnavailableError("transformers uses the package xlstm, which is installed")
    return module


def native_mlstm(chunk_sizes: Iterable[int], direction: str) -> list[Variant]:
    """Others' chunkwise mLSTM in plain torch, gradients by autograd, and once by their own."""
    found = [
        _native_mlstm(name, find, chunk_size)
        for name, find in SEQUENCES.items()
        for chunk_size in chunk_sizes
    ]
    if direction != FORWARD:
        found += [_native_mlstm(name, find, 64) for name, find in OWN_BACKWARD.items()]
    return found


def _native_mlstm(name: str, find: Find, chunk: int) -> Variant:
    def bind(_: Case, tensors: Tensors) -> Bound:
        function = find()
        # Laid out as they like it, before the clock runs.
        inputs = {name: _head_first(tensors[name]) for name in "qkvif"}
        dtype = inputs["q"].dtype

        def call() -> tuple[Tensor]:
            heads = [x.transpose(1, 2) for x in inputs.values()]
            h = function(*heads, chunk_size=chunk, autocast_kernel_dtype=dtype)
            return (h.transpose(1, 2),)

        return Bound(call, inputs)

    return Variant(f"{name}, chunks of {chunk}", bind)


def _head_first(x_BTHD: Tensor) -> Tensor:
    x = x_BTHD.detach().transpose(1, 2).contiguous().transpose(1, 2)
    return x.requires_grad_().view_as(x) if x_BTHD.requires_grad else x


def native_mlstm_step() -> list[Variant]:
    return [_native_mlstm_step(name, find) for name, find in STEPS.items()]


def _native_mlstm_step(name: str, find: Find) -> Variant:
    def bind(_: Case, tensors: Tensors) -> Bound:
        function = find()
        q, k, v, i, f, c, n, m = (tensors[name] for name in "qkvifcnm")
        i, f, m = (x[..., None] for x in (i, f, m))

        def call() -> tuple[Tensor, ...]:
            h, (last_c, last_n, last_m) = function(q, k, v, i, f, c, n, m)
            return h, last_c, last_n, last_m.squeeze(-1)

        return Bound(call, {})

    return Variant(name, bind)
