"""What every backend of a loss over rows of student logits does around its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...memory import fresh
from .rows import row_strides


def verbs(
    launch: Callable[..., Tensor], logits: int
) -> tuple[Callable[..., list[Tensor]], Callable[..., Tensor]]:
    """`forward` and `overwrite` of a backend. ``launch(*tensors, *options, grad=...)`` returns the
    loss and, unless grad is None, leaves the gradient there; `logits` is how many of the tensors,
    the student first, are to have rows that row_strides() can address."""

    def forward(student: Tensor, *call: Any, **how: Any) -> list[Tensor]:
        *call_, want_grad = call
        grad = fresh(student.shape, student.dtype, student.device) if want_grad else None
        loss = launch(student, *call_, grad=grad, **how)
        return [loss] if grad is None else [loss, grad]

    def overwrite(student: Tensor, *call: Any, grad: Tensor | None = None, **how: Any) -> Tensor:
        """`grad`, where given, gets the gradient: memory of its own or, on the CPU, the beginning
        of student's rows in a narrower dtype."""
        if grad is not None:
            return launch(student, *call, grad=grad, **how)
        if row_strides(student, *call[: logits - 1]) is None:
            loss, grad = forward(student, *call, True, **how)
            student.copy_(grad)
            return loss
        return launch(student, *call, grad=student, **how)

    return forward, overwrite
