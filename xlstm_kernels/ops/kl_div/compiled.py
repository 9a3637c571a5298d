"""What the compiled kernels of losses over rows of student logits take, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...cells import compute_dtype
from ...memory import address, dtype_code, plain
from .options import DIVERGENCES, REDUCTIONS, Options
from .ranks import Split
from .rows import Strides, read_rows


def scale(scale_rows: Callable[..., None], grad: Tensor, factor: Tensor, *stream: int) -> None:
    """grad *= factor, one number or one a row. `scale_rows` is the kernel; contiguous rows whose
    factor is 1 are not touched."""
    factor = factor.to(compute_dtype(grad.dtype)).expand(grad.shape[:-1])
    if grad.is_contiguous():
        factor, V = factor.contiguous(), grad.shape[-1]
        sizes = grad.numel() // V, V
        scale_rows(dtype_code(grad), sizes, address(grad), V, address(factor), *(stream or (0,)))
    elif grad.dim() > 2:  # one slice after the other, so that no temporary has grad's size
        for part, part_factor in zip(grad, factor, strict=True):
            scale(scale_rows, part, part_factor, *stream)
    else:
        grad.mul_(factor.unsqueeze(-1))


class StudentCall:
    """What kernels of losses over rows of student logits take of the student, and the loss."""

    def __init__(
        self,
        student: Tensor,
        stride: Strides,
        rows: tuple[int, int],
        labels: Tensor | None,
        row_weight: Tensor | None,
        options: Options,
        grad: Tensor | None,
        grad_stride: Strides,
        split: Split | None = None,
    ):
        dtype = compute_dtype(student.dtype)
        self.student, self.stride, self.rows, self.options = student, stride, rows, options
        self.labels, self.row_weight = plain(labels, torch.int64), plain(row_weight, dtype)
        self.grad, self.grad_stride, self.split = grad, grad_stride, split
        self.row_loss = student.new_empty(student.shape[:-1], dtype=dtype)
        self.reduced = options.reduction != "none"
        self.loss = student.new_empty((), dtype=dtype) if self.reduced else self.row_loss

    def arguments(self) -> tuple[Any, ...]:
        """In the order of csrc/bind.cpp."""
        options, grad = self.options, self.grad
        beta = options.beta
        kinds = (
            DIVERGENCES.index(options.divergence),
            REDUCTIONS.index(options.reduction),
            dtype_code(self.student),
            dtype_code(self.student if grad is None else grad),
            0 if self.split is None else self.split.phase,
        )
        numbers = (
            options.temperature,
            1 - beta if options.divergence == "skew_reverse" else beta,
            options.kl_weight,
            options.ce_weight,
            options.label_smoothing,
            options.z_loss,
            options.softcap or 0.0,
        )
        results = (
            address(self.row_loss),
            address(self.loss) if self.reduced else 0,
            address(grad),
            address(None if self.split is None else self.split.sums),
        )
        return (
            kinds,
            self.rows,
            self.student.shape[-1],
            address(self.student),
            self.stride,
            address(self.labels),
            options.ignore_index,
            address(self.row_weight),
            numbers,
            results,
            self.grad_stride if grad is not None else (0, 0),
        )


def kl_div_call(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
    grad: Tensor | None,
    split: Split | None = None,
) -> tuple[StudentCall, Tensor, tuple[Any, ...]]:
    """The call and the teacher, whose tensors must outlive it, and its arguments in the order of
    csrc/bind.cpp."""
    (student, teacher), rows, strides = read_rows((student, teacher), grad)
    call = StudentCall(
        student, strides[0], rows, labels, row_weight, options, grad, strides[-1], split
    )
    arguments = (
        *call.arguments(),
        dtype_code(teacher),
        teacher.shape[-1],
        address(teacher),
        strides[1],
        options.teacher_softcap or 0.0,
    )
    return call, teacher, arguments
