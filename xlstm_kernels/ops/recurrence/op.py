"""Schemas, fakes and backends of the recurrence.

What forward saves belongs to the operation (shapes.py), so a backward on another backend agrees.
"""

from __future__ import annotations

from torch import Tensor

from ...backends import Backend, Op
from ...cells import CELLS, compute_dtype
from ...library import define
from . import cpu, cuda, triton
from .shapes import last_shape, saved_shapes

FUNCTIONS = tuple(dict.fromkeys(cell.function for cell in CELLS.values()))
TABLE = {Backend.CPU: cpu, Backend.CUDA: cuda, Backend.TRITON: triton}
RECURRENCE = Op("recurrence", TABLE, FUNCTIONS)


def _fake_forward(
    x: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    n_floor: float,
    save: bool,
    backend: str,
) -> list[Tensor]:
    B, T, _, H, D = x.shape
    dtype = compute_dtype(x.dtype)
    last = last_shape(x.shape, cu_seqlens, cell)
    saved = saved_shapes(x.shape, cu_seqlens, cell) if save else ()
    return [
        x.new_empty((B, T, H, D)),
        *(x.new_empty(shape, dtype=dtype) for shape in (last, *saved)),
    ]


def _fake_backward(
    dh: Tensor | None,
    dlast: Tensor | None,
    r: Tensor,
    raw: Tensor,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    cell: str,
    n_floor: float,
    clip_grad: float | None,
    like_x: Tensor,
    want: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_r, want_b, want_state = want
    return (
        like_x.new_empty(raw.shape),
        raw.new_empty(r.shape if want_r else (0,)),
        raw.new_empty(r.shape[:3] if want_b else (0,)),
        raw.new_empty(last_shape(raw.shape, cu_seqlens, cell) if want_state else (0,)),
    )


# Returns h and the last state, and with `save` also raw and checkpoints.
forward = define(
    RECURRENCE,
    "recurrence_forward(Tensor x, Tensor r, Tensor? b, Tensor? state, Tensor? cu_seqlens, str cell,"
    " float n_floor, bool save, str backend) -> Tensor[]",
    _fake_forward,
)
# `like_x` is an empty tensor that carries x's dtype and device; x itself is not kept.
backward = define(
    RECURRENCE,
    "recurrence_backward(Tensor? dh, Tensor? dlast, Tensor r, Tensor raw, Tensor checkpoints,"
    " Tensor? cu_seqlens, str cell, float n_floor, float? clip_grad, Tensor like_x, bool[] want,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
