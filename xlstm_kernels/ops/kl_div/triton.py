"""The KL divergence in Triton on CUDA and HIP tensors: check, allocate, launch, return.

A row is read once for forward and reverse, twice for mixtures, and once more for the gradient. The
later sweeps read what is still in the cache: predicted, not measured, are 6 bytes of memory traffic
for a bfloat16 logit while all rows under way fit it, as up to 64 k words do on an H200, and up to
10 beyond, for mixtures 14; 4 for the loss alone of forward and reverse.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import TRITON_INTERPRETED
from ...cells import compute_dtype
from ...memory import on_device, refused_by_triton
from .options import Options
from .ranks import Split
from .rows import read_rows, row_strides
from .triton_launch import StudentCall, choose, first_bits, logits
from .verbs import verbs

OVER_RANKS = True


def supports(student: Tensor, teacher: Tensor) -> str | None:
    return refused_by_triton(student_logits=student, teacher_logits=teacher)


def scale(grad: Tensor, factor: Tensor) -> None:
    """In place; rows whose factor is 1 are not touched."""
    from .triton_rows import scale_kernel

    factor = factor.to(compute_dtype(grad.dtype)).expand(grad.shape[:-1])
    found, N, V = row_strides(grad), factor.numel(), grad.shape[-1]
    if found is None or N == 0:
        grad.mul_(factor.unsqueeze(-1))
        return
    (_, inner_rows), strides = found
    blocks = choose(V, N, TRITON_INTERPRETED)
    with on_device(grad):
        scale_kernel[(-(-N // blocks.rows),)](
            logits(grad, strides[0]),
            factor.contiguous(),
            N,
            inner_rows,
            ROWS=blocks.rows,
            BLOCK=blocks.columns,
            num_warps=blocks.warps,
        )


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *call_: Any,
    grad: Tensor | None,
    split: Split | None = None,
) -> Tensor:
    from .triton_kernel import kl_div_kernel

    options = Options(*call_)
    (student, teacher), (_, inner_rows), strides = read_rows((student, teacher), grad)
    call = StudentCall("kl_div", student, labels, row_weight, options, grad is not None, split)
    how, warps = call.how(max(student.shape[-1], teacher.shape[-1]))
    if call.N > 0:
        with on_device(student):
            kl_div_kernel[(-(-call.N // how.rows),)](
                logits(student, strides[0]),
                logits(teacher, strides[1]),
                logits(student if grad is None else grad, strides[-1]),
                call.given,
                call.shared(),
                call.row_loss,
                call.N,
                inner_rows,
                options.ignore_index,
                *call.numbers(),
                options.teacher_softcap or 1.0,
                first_bits(options.temperature),
                HOW=how,
                num_warps=warps,
            )
    return call.loss()


forward, overwrite = verbs(_launch, logits=2)
