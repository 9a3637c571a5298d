"""Cases of sliding-window attention, beside torch's fused attention with all of the mask."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import xlstm_kernels as xk

from .problem import FORWARD_BACKWARD, Bound, Case, Tensors, Trial, Variant

WRT = ("q", "k", "v")
SINKS = 4


def sequence(shape: tuple[int, int, int, int, int], dtype: torch.dtype, direction: str) -> Case:
    """`xk.sliding_window_attention` over (B, T, H, D, window), four first tokens seen by all."""
    B, T, H, D, window = shape
    backward = direction == FORWARD_BACKWARD
    return Case(
        op="sliding_window_attention",
        shape=f"B{B} T{T} H{H} D{D} W{window}",
        dtype=dtype,
        direction=direction,
        inputs=lambda draw: {
            name: torch.randn(B, T, H, D, generator=draw) for name in (*WRT, "dh")
        },
        outputs=("h",),
        wrt=WRT,
        reference=lambda case, tensors: Trial(
            case, _variant("eager", window, "reference"), tensors
        ).results(),
        variants=(
            _variant("cpu", window, "cpu", ours=True),
            _variant("eager", window, "reference"),
            Variant("one mask", partial(_bind_mask, window)),
        ),
        flops=(3 if backward else 1) * 4 * D * min(window + SINKS, T) * B * T * H,
        moved_bytes=(2 if backward else 1) * 4 * B * T * H * D * dtype.itemsize,
    )


def _variant(name: str, window: int, backend: str, ours: bool = False) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        inputs = {n: tensors[n] for n in WRT}
        attend = partial(xk.sliding_window_attention, window=window, sinks=SINKS, backend=backend)
        return Bound(lambda: (attend(*inputs.values()),), inputs)

    return Variant(name, bind, ours=ours)


def _bind_mask(window: int, case: Case, tensors: Tensors) -> Bound:
    inputs = {n: tensors[n] for n in WRT}
    t = torch.arange(inputs["q"].shape[1])
    back = t[:, None] - t[None]
    mask = (back >= 0) & ((back < window) | (t[None] < SINKS))

    def call() -> tuple[Tensor, ...]:
        q, k, v = (x.transpose(1, 2) for x in inputs.values())
        return (F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2),)

    return Bound(call, inputs)
