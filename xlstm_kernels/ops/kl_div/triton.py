"""The KL divergence in Triton on CUDA and HIP tensors: check, allocate, launch, return.

A row is read once for forward and reverse, twice for mixtures, and once more for the gradient. The
later sweeps read what is still in the cache: predicted, not measured, are 6 bytes of memory traffic
for a bfloat16 logit while all rows under way fit it, as up to 64 k words do on an H200, and up to
10 beyond, for mixtures 14; 4 for the loss alone of forward and reverse.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import TRITON_INTERPRETED, triton_refuses
from ...cells import compute_dtype
from .options import Options
from .rows import row_strides
from .triton_launch import DTYPES, StudentCall, choose, first_bits, logits, on_device


def supports(student: Tensor, teacher: Tensor) -> str | None:
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        if tensor.dtype not in DTYPES:
            return f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
    return triton_refuses("student_logits", student.device)


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *call: Any,
) -> list[Tensor]:
    *options, want_grad = call
    grad = student.new_empty(student.shape) if want_grad else None
    if row_strides(student, teacher) is None:
        student, teacher = student.contiguous(), teacher.contiguous()
    loss = _launch(student, teacher, labels, row_weight, Options(*options), grad)
    return [loss] if grad is None else [loss, grad]


def overwrite(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *options: Any,
) -> Tensor:
    if row_strides(student, teacher) is None:
        loss, grad = forward(student, teacher, labels, row_weight, *options, True)
        student.copy_(grad)
        return loss
    return _launch(student, teacher, labels, row_weight, Options(*options), student)


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
    options: Options,
    grad: Tensor | None,
) -> Tensor:
    from .triton_kernel import kl_div_kernel

    found = row_strides(*((student, teacher) if grad is None else (student, teacher, grad)))
    assert found is not None  # forward and overwrite have seen to it
    (_, inner_rows), strides = found
    call = StudentCall("kl_div", student, labels, row_weight, options, grad is not None)
    how, warps = call.how(max(student.shape[-1], teacher.shape[-1]))
    if call.N > 0:
        with on_device(student):
            kl_div_kernel[(-(-call.N // how.rows),)](
                logits(student, strides[0]),
                logits(teacher, strides[1]),
                logits(student if grad is None else grad, strides[-1]),
                call.given,
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
