"""The divergence from a teacher of few words in Triton: check, allocate, launch, return.

A row is read once, and once more, from the cache where it fits, for the gradient: predicted, not
measured, are 4 to 6 bytes of memory traffic for a bfloat16 logit, 2 for the loss alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cells import compute_dtype
from ...memory import on_device, plain, refused_by_triton
from ..kl_div.options import Options
from ..kl_div.ranks import Split
from ..kl_div.rows import read_rows
from ..kl_div.triton_launch import StudentCall, logits, power_of_two
from ..kl_div.verbs import verbs
from .arguments import check_ids
from .support import WITH_TAIL

# A program has all words of a row at hand, so many for each of its threads at most.
LARGEST_K = 2048
# Columns at once: beside a histogram as wide, more would not fit in registers.
LARGEST_BLOCK = 2048
# Of a program: words of all its rows, and pairs of them that it compares at once.
PROGRAM_WORDS, PROGRAM_PAIRS = 1024, 4096


OVER_RANKS = True


def supports(student: Tensor, topk_logprobs: Tensor) -> str | None:
    if why := refused_by_triton(student_logits=student, topk_logprobs=topk_logprobs):
        return why
    if (K := topk_logprobs.shape[-1]) > LARGEST_K:
        return f"topk_logprobs must be (..., K), K at most {LARGEST_K}, got {K}"
    return None


def _launch(
    student: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    tail_logmass: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *call: Any,
    grad: Tensor | None,
    split: Split | None = None,
) -> Tensor:
    from .triton_kernel import topk_kl_div_kernel
    from .triton_words import Words

    *options_, support = call
    options, dtype = Options(*options_), compute_dtype(student.dtype)
    (student,), (_, inner_rows), strides = read_rows((student,), grad)
    ids = plain(topk_ids, torch.int64)
    V, first = (student.shape[-1], 0) if split is None else (split.shard.V, split.shard.first)
    if ids.device.type == "cpu":
        check_ids("topk_kl_div", ids, V)
    student_call = StudentCall(
        "topk_kl_div", student, labels, row_weight, options, grad is not None, split
    )
    tail = plain(tail_logmass, dtype)
    words = Words(
        plain(topk_logprobs, dtype),
        ids,
        student_call.factor if tail is None else tail,
        ids.shape[-1],
        V,
        first,
    )
    how, warps = student_call.how(student.shape[-1], LARGEST_BLOCK)
    how, topk = _topk(how, ids.shape[-1], support, tail is not None)
    if student_call.N > 0:
        with on_device(student):
            topk_kl_div_kernel[(-(-student_call.N // how.rows),)](
                logits(student, strides[0]),
                words,
                logits(student if grad is None else grad, strides[-1]),
                student_call.given,
                student_call.shared(),
                student_call.row_loss,
                student_call.N,
                inner_rows,
                options.ignore_index,
                *student_call.numbers(),
                1.0 if support == "sampled" else 1 / options.temperature,
                HOW=how,
                TOPK=topk,
                num_warps=warps,
            )
    return student_call.loss()


forward, overwrite = verbs(_launch, logits=1)


def _topk(how: Any, K: int, support: str, tail_given: bool) -> tuple[Any, Any]:
    """Of rows no more than whose words fit; how words are compared."""
    from .triton_words import TopK

    columns = max(16, power_of_two(K))
    how = how._replace(rows=max(1, min(how.rows, PROGRAM_WORDS // columns)))
    step = max(2, min(16, PROGRAM_PAIRS // (how.rows * columns)))
    return how, TopK(columns, step, support, support in WITH_TAIL, tail_given)
