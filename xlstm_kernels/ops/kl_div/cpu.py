"""The KL divergence in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import load_cpu
from ...cells import compute_dtype
from ...memory import address, dtype_code, fresh_cpu, plain, refused_by_cpu
from .options import DIVERGENCES, REDUCTIONS, Options
from .ranks import Split

OVER_RANKS = True
Rows = tuple[int, int]


def supports(student: Tensor, teacher: Tensor) -> str | None:
    return refused_by_cpu(student_logits=student, teacher_logits=teacher)


def forward(student: Tensor, *call: Any, split: Split | None = None) -> list[Tensor]:
    *call_, want_grad = call
    grad = fresh_cpu(student.shape, student.dtype) if want_grad else None
    loss = _launch(student, *call_, grad=grad, split=split)
    return [loss] if grad is None else [loss, grad]


def overwrite(
    student: Tensor,
    teacher: Tensor,
    *call: Any,
    grad: Tensor | None = None,
    split: Split | None = None,
) -> Tensor:
    """`grad`, where given, gets the gradient: memory of its own, or the beginning of student's rows
    in a narrower dtype."""
    if grad is not None:
        return _launch(student, teacher, *call, grad=grad, split=split)
    if row_strides(student, teacher) is None:
        loss, grad = forward(student, teacher, *call, True, split=split)
        student.copy_(grad)
        return loss
    return _launch(student, teacher, *call, grad=student, split=split)


def scale(grad: Tensor, factor: Tensor) -> None:
    """In place; rows whose factor is 1 are not touched."""
    factor = factor.to(compute_dtype(grad.dtype)).expand(grad.shape[:-1])
    if not grad.is_contiguous():
        if grad.dim() > 2:  # one slice after the other, so that no temporary has grad's size
            for part, part_factor in zip(grad, factor, strict=True):
                scale(part, part_factor)
        else:
            grad.mul_(factor.unsqueeze(-1))
        return
    factor, V = factor.contiguous(), grad.shape[-1]
    load_cpu().scale_rows(
        dtype_code(grad), (grad.numel() // V, V), address(grad), V, address(factor), 0
    )


def row_strides(*tensors: Tensor) -> tuple[Rows, list[Rows]] | None:
    """(rows, strides of each tensor) that address all rows as a matrix of rows, so that a view such
    as ``logits[:, :-1]`` needs no copy; None where two strides are not enough or V is strided."""
    if any(tensor.stride(-1) != 1 and tensor.shape[-1] > 1 for tensor in tensors):
        return None
    if tensors[0].numel() == 0:
        return (0, 0), [(0, 0)] * len(tensors)
    axes: list[tuple[int, list[int]]] = []  # outer to inner: size, stride in each tensor
    for axis, size in enumerate(tensors[0].shape[:-1]):
        strides = [tensor.stride(axis) for tensor in tensors]
        if size == 1:
            continue
        if axes and axes[-1][1] == [size * stride for stride in strides]:
            axes[-1] = axes[-1][0] * size, strides
        else:
            axes.append((size, strides))
    if len(axes) > 2:
        return None
    axes = [(1, [0] * len(tensors))] * (2 - len(axes)) + axes
    (outer, outer_strides), (inner, inner_strides) = axes
    return (outer, inner), list(zip(outer_strides, inner_strides, strict=True))


def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *options: Any,
    grad: Tensor | None,
    split: Split | None,
) -> Tensor:
    if row_strides(student, teacher) is None:
        student, teacher = student.contiguous(), teacher.contiguous()
    logits = (student, teacher) if grad is None else (student, teacher, grad)
    found = row_strides(*logits)
    assert found is not None  # a gradient of its own is contiguous
    rows, strides = found
    call = StudentCall(
        student, strides[0], rows, labels, row_weight, Options(*options), grad, strides[-1], split
    )
    load_cpu().kl_div(
        *call.arguments(),
        dtype_code(teacher),
        teacher.shape[-1],
        address(teacher),
        strides[1],
        call.options.teacher_softcap or 0.0,
    )
    return call.loss


class StudentCall:
    """What kernels of losses over rows of student logits take of the student, and the loss."""

    def __init__(
        self,
        student: Tensor,
        stride: Rows,
        rows: Rows,
        labels: Tensor | None,
        row_weight: Tensor | None,
        options: Options,
        grad: Tensor | None,
        grad_stride: Rows,
        split: Split | None,
    ):
        dtype = compute_dtype(student.dtype)
        self.student, self.stride, self.rows, self.options = student, stride, rows, options
        self.labels, self.row_weight = plain(labels, torch.int64), plain(row_weight, dtype)
        self.grad, self.grad_stride, self.split = grad, grad_stride, split
        self.row_loss = torch.empty(student.shape[:-1], dtype=dtype)
        self.reduced = options.reduction != "none"
        self.loss = torch.empty((), dtype=dtype) if self.reduced else self.row_loss

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
