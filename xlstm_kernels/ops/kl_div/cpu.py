"""The KL divergence in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import load_cpu
from ...memory import fresh_cpu, refused_by_cpu
from . import compiled
from .options import Options
from .ranks import Split
from .rows import row_strides

OVER_RANKS = True


def supports(student: Tensor, teacher: Tensor) -> str | None:
    return refused_by_cpu(student_logits=student, teacher_logits=teacher)


def forward(student: Tensor, *call: Any, split: Split | None = None) -> list[Tensor]:
    *call_, want_grad = call
    grad = fresh_cpu(student.shape, student.dtype) if want_grad else None
    loss = _launch(student, *call_, grad=grad, split=split)
    return [loss] if grad is None else [loss, grad]


def overwrite(
    student: Tensor,
    teacher: Tensor,
    *call: Any,
    grad: Tensor | None = None,
    split: Split | None = None,
) -> Tensor:
    """`grad`, where given, gets the gradient: memory of its own, or the beginning of student's rows
    in a narrower dtype."""
    if grad is not None:
        return _launch(student, teacher, *call, grad=grad, split=split)
    if row_strides(student, teacher) is None:
        loss, grad = forward(student, teacher, *call, True, split=split)
        student.copy_(grad)
        return loss
    return _launch(student, teacher, *call, grad=student, split=split)


def scale(grad: Tensor, factor: Tensor) -> None:
    """In place."""
    compiled.scale(load_cpu().scale_rows, grad, factor)


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *options: Any,
    grad: Tensor | None,
    split: Split | None,
) -> Tensor:
    call, _teacher, arguments = compiled.kl_div_call(
        student, teacher, labels, row_weight, Options(*options), grad, split
    )
    load_cpu().kl_div(*arguments)
    return call.loss
