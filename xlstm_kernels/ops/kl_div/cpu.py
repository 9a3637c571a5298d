"""The KL divergence in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import load_cpu
from ...memory import refused_by_cpu
from . import compiled
from .options import Options
from .ranks import Split
from .verbs import verbs

OVER_RANKS = True


def supports(student: Tensor, teacher: Tensor) -> str | None:
    return refused_by_cpu(student_logits=student, teacher_logits=teacher)


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
    split: Split | None = None,
) -> Tensor:
    call, _teacher, arguments = compiled.kl_div_call(
        student, teacher, labels, row_weight, Options(*options), grad, split
    )
    load_cpu().kl_div(*arguments)
    return call.loss


forward, overwrite = verbs(_launch, logits=2)
