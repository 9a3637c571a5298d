"""The divergence from a teacher of few words in CUDA C++: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...memory import address, launching, refused_by_cuda
from ..kl_div.rows import row_strides
from .compiled import topk_kl_div_call

MAX_WORDS = 2048  # of a row; a block has them in shared memory


def supports(student: Tensor, topk_logprobs: Tensor) -> str | None:
    if why := refused_by_cuda(student_logits=student, topk_logprobs=topk_logprobs):
        return why
    if (K := topk_logprobs.shape[-1]) > MAX_WORDS:
        return f"topk_logprobs must be (..., K), K at most {MAX_WORDS}, got {K}"
    return None


def forward(student: Tensor, *call: Any) -> list[Tensor]:
    *call_, want_grad = call
    grad = student.new_empty(student.shape) if want_grad else None
    loss = _launch(student, *call_, grad=grad)
    return [loss] if grad is None else [loss, grad]


def overwrite(student: Tensor, *call: Any) -> Tensor:
    if row_strides(student) is None:
        loss, grad = forward(student, *call, True)
        student.copy_(grad)
        return loss
    return _launch(student, *call, grad=student)


def _launch(student: Tensor, *call: Any, grad: Tensor | None) -> Tensor:
    student_call, _target, arguments = topk_kl_div_call(student, *call, grad=grad)
    counted = student.new_empty((), dtype=torch.float64)
    with launching(student) as (kernels, stream):
        kernels.topk_kl_div(*arguments, address(counted), stream)
    return student_call.loss
