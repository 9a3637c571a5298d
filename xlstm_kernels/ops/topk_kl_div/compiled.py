"""What the compiled kernels of the divergence from a teacher of few words take, on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cells import compute_dtype
from ...memory import address, plain
from ..kl_div.compiled import StudentCall
from ..kl_div.options import Options
from ..kl_div.ranks import Split
from ..kl_div.rows import read_rows
from .support import SUPPORTS


def topk_kl_div_call(
    student: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    tail_logmass: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *call: Any,
    grad: Tensor | None,
    split: Split | None = None,
) -> tuple[StudentCall, tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The call and the target, whose tensors must outlive it, and its arguments in the order of
    csrc/bind.cpp."""
    *options_, support = call
    options, dtype = Options(*options_), compute_dtype(student.dtype)
    (student,), rows, strides = read_rows((student,), grad)
    student_call = StudentCall(
        student, strides[0], rows, labels, row_weight, options, grad, strides[-1], split
    )
    logprobs, ids = plain(topk_logprobs, dtype), plain(topk_ids, torch.int64)
    V, first = (student.shape[-1], 0) if split is None else (split.shard.V, split.shard.first)
    z_words = None if split is None else split.z_words
    target = logprobs, ids, plain(tail_logmass, dtype), z_words
    arguments = (
        *student_call.arguments(),
        SUPPORTS.index(support),
        (V, first, ids.shape[-1]),
        tuple(map(address, target)),
    )
    return student_call, target, arguments
