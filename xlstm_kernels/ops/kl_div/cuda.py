"""The KL divergence in CUDA C++: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...memory import address, launching, refused_by_cuda
from . import compiled
from .options import Options
from .ranks import Split
from .verbs import verbs

OVER_RANKS = True


def supports(student: Tensor, teacher: Tensor) -> str | None:
    return refused_by_cuda(student_logits=student, teacher_logits=teacher)


def scale(grad: Tensor, factor: Tensor) -> None:
    """In place."""
    with launching(grad) as (kernels, stream):
        compiled.scale(kernels.scale_rows, grad, factor, stream)


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *options: Any,
    grad: Tensor | None,
    split: Split | None = None,
) -> Tensor:
    call, _teacher, arguments = compiled.kl_div_call(
        student, teacher, labels, row_weight, Options(*options), grad, split
    )
    counted = student.new_empty((), dtype=torch.float64)
    with launching(student) as (kernels, stream):
        kernels.kl_div(*arguments, address(counted), stream)
    return call.loss


forward, overwrite = verbs(_launch, logits=2)
