"""Backends of sliding-window attention. `reference` and `cpu` are torch's own products and kernels,
which compile, trace and differentiate themselves; schemas are those of compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import Backend, Op
from ...library import define
from . import cpu, triton

SLIDING_WINDOW_ATTENTION = Op(
    "sliding_window_attention", {Backend.CPU: cpu, Backend.TRITON: triton}
)

_OPTIONS = "int[]? starts, int window, int sinks, float scale, str backend"


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> list[Tensor]:
    B, T, H, _ = q.shape
    return [q.new_empty(B, T, H, v.shape[3]), q.new_empty(H, B * T, dtype=torch.float32)]


def _fake_backward(dh: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


# Returns h, and the logarithms of the sums that backward needs.
forward = define(
    SLIDING_WINDOW_ATTENTION,
    f"sliding_window_attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> Tensor[]",
    _fake_forward,
)
# Returns dq, dk and dv.
backward = define(
    SLIDING_WINDOW_ATTENTION,
    "sliding_window_attention_backward(Tensor dh, Tensor q, Tensor k, Tensor v, Tensor h,"
    f" Tensor lse, {_OPTIONS}) -> Tensor[]",
    _fake_backward,
)
