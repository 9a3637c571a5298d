"""The KL divergence in C++ on CPU tensors: check, allocate, launch, return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import load_cpu
from ...cells import compute_dtype
from ...memory import address, dtype_code, fresh_cpu, plain, refused_by_cpu
from .options import DIVERGENCES, REDUCTIONS, Options

Rows = tuple[int, int]


def supports(student: Tensor, teacher: Tensor) -> str | None:
    return refused_by_cpu(student_logits=student, teacher_logits=teacher)


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    *call: Any,
) -> list[Tensor]:
    *options, want_grad = call
    grad = fresh_cpu(student.shape, student.dtype) if want_grad else None
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
    options: Options,
    grad: Tensor | None,
) -> Tensor:
    leading, dtype = student.shape[:-1], compute_dtype(student.dtype)
    logits = (student, teacher) if grad is None else (student, teacher, grad)
    found = row_strides(*logits)
    assert found is not None  # supports() has seen to it
    rows, strides = found
    labels = plain(labels, torch.int64)
    row_weight = plain(row_weight, dtype)
    row_loss = torch.empty(leading, dtype=dtype)
    reduced = options.reduction != "none"
    loss = torch.empty((), dtype=dtype) if reduced else row_loss
    load_cpu().kl_div(
        DIVERGENCES.index(options.divergence),
        REDUCTIONS.index(options.reduction),
        (dtype_code(student), dtype_code(teacher)),
        rows,
        (student.shape[-1], teacher.shape[-1]),
        address(student),
        strides[0],
        address(teacher),
        strides[1],
        address(labels),
        options.ignore_index,
        address(row_weight),
        options.temperature,
        options.kl_weight,
        options.ce_weight,
        address(row_loss),
        address(loss) if reduced else 0,
        address(grad),
        strides[2] if grad is not None else (0, 0),
    )
    return loss
