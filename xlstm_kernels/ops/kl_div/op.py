"""Schemas, fakes and backends of the KL divergence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from . import cpu
from .options import SCHEMA

KL_DIV = Op("kl_div", {Backend.CPU: cpu})

_ARGUMENTS = f" Tensor teacher, Tensor? labels, Tensor? row_weight, {SCHEMA},"


def _fake_loss(student: Tensor, reduction: str) -> Tensor:
    shape = student.shape[:-1] if reduction == "none" else ()
    return student.new_empty(shape, dtype=compute_dtype(student.dtype))


def _fake_forward(student: Tensor, *call: Any) -> list[Tensor]:
    *_, reduction, want_grad, _ = call
    loss = _fake_loss(student, reduction)
    return [loss, student.new_empty(student.shape)] if want_grad else [loss]


def _fake_overwrite(student: Tensor, *call: Any) -> Tensor:
    *_, reduction, _ = call
    return _fake_loss(student, reduction)


def _fake_scale(grad: Tensor, factor: Tensor, backend: str) -> None:
    return None


# Returns the loss and, with `want_grad`, its gradient by student; by each row's own for "none".
forward = define(
    KL_DIV,
    f"kl_div_forward(Tensor student,{_ARGUMENTS} bool want_grad, str backend) -> Tensor[]",
    _fake_forward,
)
# The same, with the gradient written over student.
overwrite = define(
    KL_DIV,
    f"kl_div_overwrite(Tensor(a!) student,{_ARGUMENTS} str backend) -> Tensor",
    _fake_overwrite,
)
# grad *= factor, a scalar or one factor a row.
scale = define(
    KL_DIV, "kl_div_scale(Tensor(a!) grad, Tensor factor, str backend) -> ()", _fake_scale
)
