"""The divergence from a teacher of few words in C++: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import load_cpu
from ...memory import fresh_cpu, refused_by_cpu
from ..kl_div.ranks import Split
from ..kl_div.rows import row_strides
from .compiled import topk_kl_div_call

OVER_RANKS = True


def supports(student: Tensor, topk_logprobs: Tensor) -> str | None:
    return refused_by_cpu(student_logits=student, topk_logprobs=topk_logprobs)


def forward(student: Tensor, *call: Any, split: Split | None = None) -> list[Tensor]:
    *call_, want_grad = call
    grad = fresh_cpu(student.shape, student.dtype) if want_grad else None
    loss = _launch(student, *call_, grad=grad, split=split)
    return [loss] if grad is None else [loss, grad]


def overwrite(
    student: Tensor, *call: Any, grad: Tensor | None = None, split: Split | None = None
) -> Tensor:
    """As that of kl_div."""
    if grad is not None:
        return _launch(student, *call, grad=grad, split=split)
    if row_strides(student) is None:
        loss, grad = forward(student, *call, True, split=split)
        student.copy_(grad)
        return loss
    return _launch(student, *call, grad=student, split=split)


def _launch(*call: Any, grad: Tensor | None, split: Split | None) -> Tensor:
    student_call, _target, arguments = topk_kl_div_call(*call, grad=grad, split=split)
    load_cpu().topk_kl_div(*arguments)
    return student_call.loss
