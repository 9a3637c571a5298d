"""Cases of the recurrent cells: a sequence, one decoding step, a layer with input projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import xlstm_kernels as xk

from . import peers
from .problem import FORWARD, FORWARD_BACKWARD, Bound, Case, Tensors, Trial, Variant

GATES = 4
FLOAT_BYTES = 4
STATES = {"slstm": xk.SLSTMState._fields, "lstm": xk.LSTMState._fields}
STEP_GRADS = ("x", "r", "b")
LAYER_GRADS = ("input", "w_ih", "w_hh", "b_ih", "b_hh")


def sequence(op: str, shape: tuple[int, int, int, int], direction: str) -> Case:
    """`xk.slstm` or `xk.lstm` over (B, T, H, D) pre-activations, from a zero state."""
    B, T, H, D = shape
    backward = direction == FORWARD_BACKWARD
    elements = B * T * (GATES + 1) * H * D + GATES * H * D * (D + 1)  # x and h; r and b
    last = len(STATES[op]) * B * H * D
    return Case(
        op=op,
        shape=f"B{B} T{T} H{H} D{D}",
        dtype=torch.float32,
        direction=direction,
        inputs=lambda draw: _inputs(draw, *shape),
        outputs=("h", *(f"last_{name}" for name in STATES[op])),
        wrt=STEP_GRADS,
        reference=_reference(bind_sequence),
        variants=(_ours(bind_sequence), peers.eager_loop(bind_sequence), peers.compiled_step()),
        flops=(3 if backward else 1) * 2 * GATES * D * D * B * H * T,
        moved_bytes=FLOAT_BYTES * ((2 if backward else 1) * elements + last),
    )


def step(op: str, H: int, D: int) -> Case:
    """One token of one sequence from a given state: the latency of decoding."""
    states = len(STATES[op])
    return Case(
        op=op,
        shape=f"B1 T1 H{H} D{D}",
        dtype=torch.float32,
        direction=FORWARD,
        inputs=lambda draw: _inputs(draw, 1, 1, H, D) | _state(draw, op, H, D),
        outputs=("h", *(f"last_{name}" for name in STATES[op])),
        wrt=STEP_GRADS,
        reference=_reference(bind_sequence),
        variants=(_ours(bind_sequence), peers.eager_loop(bind_sequence), peers.compiled_step()),
        flops=2 * GATES * D * D * H,
        moved_bytes=FLOAT_BYTES * (GATES * H * D * (D + 2) + (1 + 2 * states) * H * D),
    )


def layer(shape: tuple[int, int, int, int], direction: str) -> Case:
    """An LSTM layer of one head, input projection included, as `torch.nn.LSTM` computes it."""
    B, T, _, D = shape
    backward = direction == FORWARD_BACKWARD
    elements = 2 * B * T * D + 2 * GATES * D * (D + 1)
    return Case(
        op="lstm",
        shape=f"layer B{B} T{T} H1 D{D}",
        dtype=torch.float32,
        direction=direction,
        inputs=lambda draw: _layer_inputs(draw, B, T, D),
        outputs=("h", "last_h", "last_c"),
        wrt=LAYER_GRADS,
        reference=_reference(bind_layer),
        variants=(_ours(bind_layer), peers.nn_lstm(), peers.eager_loop(bind_layer)),
        flops=(3 if backward else 1) * 2 * 2 * GATES * D * D * B * T,
        moved_bytes=FLOAT_BYTES * ((2 if backward else 1) * elements + 2 * B * D),
    )


def bind_sequence(case: Case, tensors: Tensors, backend: str) -> Bound:
    op = getattr(xk, case.op)
    x, r, b = tensors["x"], tensors["r"], tensors["b"]
    names = [f"state_{name}" for name in STATES[case.op]]
    state = tuple(tensors[name] for name in names) if names[0] in tensors else None

    def call() -> tuple[Tensor, ...]:
        h, last = op(x, r, b, state, backend=backend)
        return (h, *last)

    return Bound(call, {name: tensors[name] for name in case.wrt})


def bind_layer(case: Case, tensors: Tensors, backend: str) -> Bound:
    wrt = {name: tensors[name] for name in case.wrt}
    input_BTE, w_ih, w_hh, b_ih, b_hh = wrt.values()
    B, T, _ = input_BTE.shape
    D = w_hh.shape[1]

    def call() -> tuple[Tensor, ...]:
        x = F.linear(input_BTE, w_ih, b_ih).view(B, T, GATES, 1, D)
        h, last = xk.lstm(x, w_hh.view(GATES, 1, D, D), b_hh.view(GATES, 1, D), backend=backend)
        return h.view(B, T, D), last.h.view(B, D), last.c.view(B, D)

    return Bound(call, wrt)


def _ours(bind) -> Variant:
    return Variant("cpu", lambda case, tensors: bind(case, tensors, "cpu"), ours=True)


def _reference(bind):
    variant = Variant("reference", lambda case, tensors: bind(case, tensors, "reference"))
    return lambda case, tensors: Trial(case, variant, tensors).results()


def _inputs(draw: torch.Generator, B: int, T: int, H: int, D: int) -> Tensors:
    """Gate pre-activations of unit size; recurrent weights that neither grow nor kill the state."""
    return {
        "x": torch.randn(B, T, GATES, H, D, generator=draw),
        "r": torch.randn(GATES, H, D, D, generator=draw) / D**0.5,
        "b": torch.randn(GATES, H, D, generator=draw) / 2,
        "dh": torch.randn(B, T, H, D, generator=draw),
    }


def _state(draw: torch.Generator, op: str, H: int, D: int) -> Tensors:
    """A state as left by some tokens: |h| < 1, and the normaliser, where there is one, positive."""
    state = {f"state_{name}": torch.randn(1, H, D, generator=draw) for name in STATES[op]}
    state["state_h"].tanh_()
    if "state_n" in state:
        state["state_n"].abs_().add_(0.5)
    return state


def _layer_inputs(draw: torch.Generator, B: int, T: int, D: int) -> Tensors:
    """Weights uniform within 1 / sqrt(D), as `torch.nn.LSTM` starts; input size D."""

    def uniform(*size: int) -> Tensor:
        return (torch.rand(*size, generator=draw) * 2 - 1) / D**0.5

    return {
        "input": torch.randn(B, T, D, generator=draw),
        "w_ih": uniform(GATES * D, D),
        "w_hh": uniform(GATES * D, D),
        "b_ih": uniform(GATES * D),
        "b_hh": uniform(GATES * D),
        "dh": torch.randn(B, T, D, generator=draw),
    }
