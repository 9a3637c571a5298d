"""Cases of the mLSTM: a sequence, forward and backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import xlstm_kernels as xk

from .problem import FORWARD_BACKWARD, Bound, Case, Tensors, Trial, Variant

INPUTS = ("q", "k", "v", "i", "f")
EAGER_CHUNKS = (64, 128, 256)  # what native torch code is fastest at depends on the sequence


def sequence(shape: tuple[int, int, int, int, int], dtype: torch.dtype, direction: str) -> Case:
    """`xk.mlstm` over (B, T, H, K, V) from a zero state, with no norm layer behind it."""
    B, T, H, K, V = shape
    backward = direction == FORWARD_BACKWARD
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
            *(_eager(chunk_size) for chunk_size in EAGER_CHUNKS),
        ),
        # One token: k v^T into the state, q out of it; and for the backward each again for either
        # operand.
        flops=(3 if backward else 1) * 4 * K * V * B * T * H,
        moved_bytes=(2 if backward else 1) * 2 * (K + V + 1) * B * T * H * dtype.itemsize,
    )


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
