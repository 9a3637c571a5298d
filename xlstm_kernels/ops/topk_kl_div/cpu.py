"""The divergence from a teacher of few words in C++: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import load_cpu
from ...cells import compute_dtype
from ...memory import address, fresh_cpu, plain, refused_by_cpu
from ..kl_div.compiled import StudentCall
from ..kl_div.options import Options
from ..kl_div.ranks import Split
from ..kl_div.rows import row_strides
from .support import SUPPORTS

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


def _launch(
    student: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    tail_logmass: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *call: Any,
    grad: Tensor | None,
    split: Split | None,
) -> Tensor:
    if row_strides(student) is None:
        student = student.contiguous()
    *options_, support = call
    options, dtype = Options(*options_), compute_dtype(student.dtype)
    found = row_strides(student) if grad is None else row_strides(student, grad)
    assert found is not None  # a gradient of its own is contiguous
    rows, strides = found
    student_call = StudentCall(
        student, strides[0], rows, labels, row_weight, options, grad, strides[-1], split
    )
    logprobs, ids = plain(topk_logprobs, dtype), plain(topk_ids, torch.int64)
    tail = plain(tail_logmass, dtype)
    V, first = (student.shape[-1], 0) if split is None else (split.shard.V, split.shard.first)
    z_words = None if split is None else split.z_words
    load_cpu().topk_kl_div(
        *student_call.arguments(),
        SUPPORTS.index(support),
        (V, first, ids.shape[-1]),
        (address(logprobs), address(ids), address(tail), address(z_words)),
    )
    return student_call.loss
