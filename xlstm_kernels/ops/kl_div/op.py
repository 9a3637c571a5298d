"""Schemas, fakes and backends of the KL divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from . import cpu, cuda, triton
from .options import SCHEMA

KL_DIV = Op("kl_div", {Backend.CPU: cpu, Backend.CUDA: cuda, Backend.TRITON: triton})


def define_row_loss(
    op: Op, target: str, more: str = ""
) -> tuple[Callable[..., list[Tensor]], Callable[..., Tensor]]:
    """Operators of a loss over rows of student logits, by the schema of its target and of what
    comes after the options. The first returns the loss and, with `want_grad`, its gradient by
    student, by each row's own for reduction "none"; the second writes that over student."""
    arguments = f"{target}, Tensor? labels, Tensor? row_weight, {SCHEMA},{more}"
    behind = more.count(",")

    def fake_loss(student: Tensor, *call: Any) -> Tensor:
        shape = student.shape[:-1] if call[-1 - behind] == "none" else ()
        return student.new_empty(shape, dtype=compute_dtype(student.dtype))

    def fake_forward(student: Tensor, *call: Any) -> list[Tensor]:
        *call_, want_grad, _ = call
        loss = fake_loss(student, *call_)
        return [loss, student.new_empty(student.shape)] if want_grad else [loss]

    def fake_overwrite(student: Tensor, *call: Any) -> Tensor:
        return fake_loss(student, *call[:-1])

    schema = f"{op.name}_forward(Tensor student, {arguments} bool want_grad, str backend)"
    forward = define(op, f"{schema} -> Tensor[]", fake_forward)
    schema = f"{op.name}_overwrite(Tensor(a!) student, {arguments} str backend)"
    return forward, define(op, f"{schema} -> Tensor", fake_overwrite)


def _fake_scale(grad: Tensor, factor: Tensor, backend: str) -> None:
    return None


forward, overwrite = define_row_loss(KL_DIV, "Tensor teacher")
# grad *= factor, a scalar or one factor a row.
scale = define(
    KL_DIV, "kl_div_scale(Tensor(a!) grad, Tensor factor, str backend) -> ()", _fake_scale
)
