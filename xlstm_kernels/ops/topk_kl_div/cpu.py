"""The divergence from a teacher of few words in C++: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import load_cpu
from ...memory import refused_by_cpu
from ..kl_div.ranks import Split
from ..kl_div.verbs import verbs
from .compiled import topk_kl_div_call

OVER_RANKS = True


def supports(student: Tensor, topk_logprobs: Tensor) -> str | None:
    return refused_by_cpu(student_logits=student, topk_logprobs=topk_logprobs)


def _launch(*call: Any, grad: Tensor | None, split: Split | None = None) -> Tensor:
    student_call, _target, arguments = topk_kl_div_call(*call, grad=grad, split=split)
    load_cpu().topk_kl_div(*arguments)
    return student_call.loss


forward, overwrite = verbs(_launch, logits=1)
