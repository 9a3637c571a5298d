"""Cases of the mLSTM: a sequence, forward and backward, and decoding steps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import xlstm_kernels as xk

from . import peers
from .problem import FORWARD, FORWARD_BACKWARD, Bound, Case, Tensors, Trial, Variant

INPUTS = ("q", "k", "v", "i", "f")
STATE = xk.MLSTMState._fields
FLOAT_BYTES = 4
WIDENED = 2.0  # tests/mlstm_cases.py, for the normaliser "max"
CHUNKS = (64, 128, 256)  # what native torch code is fastest at depends on the sequence


def sequence(shape: tuple[int, int, int, int, int], dtype: torch.dtype, direction: str) -> Case:
    """`xk.mlstm` over (B, T, H, K, V) from a zero state, with no norm layer behind it."""
    B, T, H, K, V = shape
    backward = direction == FORWARD_BACKWARD
    chunks = [chunk for chunk in CHUNKS if T % chunk == 0]
    return Case(
        op="mlstm",
        shape=f"B{B} T{T} H{H} K{K} V{V}",
        dtype=dtype,
        direction=direction,
        inputs=lambda draw: _inputs(draw, *shape),
        outputs=("h",),
        wrt=INPUTS,
        reference=lambda case, tensors: Trial(case, _eager(64), tensors).results(),
        variants=(
            Variant("cpu", partial(_bind, backend="cpu"), ours=True),
            *(_eager(chunk) for chunk in chunks),
            *peers.native_mlstm(chunks, direction),
        ),
        # One token: k v^T into the state, q out of it; and for the backward each again for either
        # operand.
        flops=(3 if backward else 1) * 4 * K * V * B * T * H,
        moved_bytes=(2 if backward else 1) * 2 * (K + V + 1) * B * T * H * dtype.itemsize,
        widened=WIDENED,
    )


def step(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float32) -> Case:
    """`xk.mlstm_step`: T tokens of each sequence, c in `dtype` too. In place, the state is put back
    before each call of every variant, outside the clock."""
    state_bytes = K * V * dtype.itemsize + (K + 1) * FLOAT_BYTES
    token_bytes = T * (2 * K + 2 * V + 2) * dtype.itemsize
    single = T == 1 and dtype == torch.float32  # what the peers compute
    return Case(
        op="mlstm_step",
        shape=f"B{B}{f' T{T}' if T > 1 else ''} H{H} K{K} V{V}",
        dtype=dtype,
        direction=FORWARD,
        inputs=lambda draw: _step_inputs(draw, B, T, H, K, V),
        outputs=("h", *(f"last_{name}" for name in STATE)),
        wrt=(),
        reference=lambda case, tensors: Trial(case, _step("eager", "reference"), tensors).results(),
        variants=(
            _step("cpu", "cpu", ours=True),
            _step("cpu in place", "cpu", ours=True, inplace=True),
            _step("eager", "reference"),
            *(peers.native_mlstm_step() if single else ()),
        ),
        flops=4 * K * V * B * T * H,
        moved_bytes=B * H * (2 * state_bytes + token_bytes),
        restore=STATE,
        float32=("n", "m"),
        widened=WIDENED,
    )


def _step(name: str, backend: str, ours: bool = False, inplace: bool = False) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        token = [tensors[name] for name in INPUTS]
        state = xk.MLSTMState(*(tensors[name] for name in STATE))

        def call() -> tuple[Tensor, ...]:
            h, last = xk.mlstm_step(*token, state, inplace=inplace, backend=backend)
            return (h, *last)

        return Bound(call, {})

    return Variant(name, bind, ours=ours)


def _step_inputs(draw: torch.Generator, B: int, T: int, H: int, K: int, V: int) -> Tensors:
    """Tokens as in a sequence, without their axis where there is one, and a state of unit size."""
    sequence = _inputs(draw, B, T, H, K, V)
    return {name: x.squeeze(1) if T == 1 else x for name, x in sequence.items()} | {
        "c": torch.randn(B, H, K, V, generator=draw),
        "n": torch.randn(B, H, K, generator=draw),
        "m": torch.randn(B, H, generator=draw),
    }


def _eager(chunk_size: int) -> Variant:
    """The chunkwise form in plain torch, gradients by autograd."""
    bind = partial(_bind, backend="reference", chunk_size=chunk_size)
    return Variant(f"eager, chunks of {chunk_size}", bind)


def _bind(case: Case, tensors: Tensors, backend: str, chunk_size: int | None = None) -> Bound:
    inputs = {name: tensors[name] for name in INPUTS}

    def call() -> tuple[Tensor, ...]:
        h, _ = xk.mlstm(*inputs.values(), backend=backend, chunk_size=chunk_size)
        return (h,)

    return Bound(call, inputs)


def _inputs(draw: torch.Generator, B: int, T: int, H: int, K: int, V: int) -> Tensors:
    """Unit size; forget gates around sigmoid(3), which remember some twenty tokens."""
    return {
        "q": torch.randn(B, T, H, K, generator=draw),
        "k": torch.randn(B, T, H, K, generator=draw),
        "v": torch.randn(B, T, H, V, generator=draw),
        "i": torch.randn(B, T, H, generator=draw),
        "f": torch.randn(B, T, H, generator=draw) + 3,
        "dh": torch.randn(B, T, H, V, generator=draw),
    }
