"""Schemas, fakes and backends of the KL divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from . import cpu, cuda, triton
from .options import SCHEMA, Options, with_numbers

KL_DIV = Op("kl_div", {Backend.CPU: cpu, Backend.CUDA: cuda, Backend.TRITON: triton})


def define_row_loss(op: Op, target: str, more: str = "") -> tuple[Callable[..., Any], ...]:
    """Operators of a loss over rows of student logits, by the schema of its target and of what
    comes after the options. The first returns the loss and, with `want_grad`, its gradient by
    student, by each row's own for reduction "none"; the second writes that over student; the third
    is the first, with its numbers in a tensor."""
    tensors = f"{target}, Tensor? labels, Tensor? row_weight,"
    arguments = f"{tensors} {SCHEMA},{more}"
    behind, options = more.count(","), tensors.count(",")

    def fake_loss(student: Tensor, *call: Any) -> Tensor:
        shape = student.shape[:-1] if call[-1 - behind] == "none" else ()
        return student.new_empty(shape, dtype=compute_dtype(student.dtype))

    def fake_forward(student: Tensor, *call: Any) -> list[Tensor]:
        *call_, want_grad, _ = call
        loss = fake_loss(student, *call_)
        return [loss, student.new_empty(student.shape)] if want_grad else [loss]

    def fake_overwrite(student: Tensor, *call: Any) -> Tensor:
        return fake_loss(student, *call[:-1])

    def fake_forward_by(student: Tensor, numbers: Tensor, *call: Any) -> list[Tensor]:
        return fake_forward(student, *call)

    def read_numbers(student: Tensor, numbers: Tensor, *call: Any) -> tuple[Any, ...]:
        end = options + len(Options._fields)
        read = with_numbers(call[options:end], numbers)
        return student, *call[:options], *read, *call[end:]

    schema = f"{op.name}_forward(Tensor student, {arguments} bool want_grad, str backend)"
    forward = define(op, f"{schema} -> Tensor[]", fake_forward)
    schema = f"{op.name}_overwrite(Tensor(a!) student, {arguments} str backend)"
    overwrite = define(op, f"{schema} -> Tensor", fake_overwrite)
    schema = f"{op.name}_forward_by(Tensor student, Tensor numbers, {arguments} bool want_grad,"
    by = define(op, f"{schema} str backend) -> Tensor[]", fake_forward_by, "forward", read_numbers)
    return forward, overwrite, by


def _fake_scale(grad: Tensor, factor: Tensor, backend: str) -> None:
    return None


forward, overwrite, forward_by = define_row_loss(KL_DIV, "Tensor teacher")
# grad *= factor, a scalar or one factor a row.
scale = define(
    KL_DIV, "kl_div_scale(Tensor(a!) grad, Tensor factor, str backend) -> ()", _fake_scale
)
