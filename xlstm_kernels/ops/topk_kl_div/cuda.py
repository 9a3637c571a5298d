"""The divergence from a teacher of few words in CUDA C++: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...memory import address, launching, refused_by_cuda
from ..kl_div.ranks import Split
from ..kl_div.verbs import verbs
from .compiled import topk_kl_div_call

OVER_RANKS = True
MAX_WORDS = 2048  # of a row; a block has them in shared memory


def supports(student: Tensor, topk_logprobs: Tensor) -> str | None:
    if why := refused_by_cuda(student_logits=student, topk_logprobs=topk_logprobs):
        return why
    if (K := topk_logprobs.shape[-1]) > MAX_WORDS:
        return f"topk_logprobs must be (..., K), K at most {MAX_WORDS}, got {K}"
    return None


def _launch(student: Tensor, *call: Any, grad: Tensor | None, split: Split | None = None) -> Tensor:
    student_call, _target, arguments = topk_kl_div_call(student, *call, grad=grad, split=split)
    counted = student.new_empty((), dtype=torch.float64)
    with launching(student) as (kernels, stream):
        kernels.topk_kl_div(*arguments, address(counted), stream)
    return student_call.loss


forward, overwrite = verbs(_launch, logits=1)
