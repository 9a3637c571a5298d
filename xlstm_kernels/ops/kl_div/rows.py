"""What losses over rows of student logits ask of their tensors, and how kernels address them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import check_is_tensor

# From row to row of two axes, outer and inner.
Strides = tuple[int, int]


def check_logits(function: str, name: str, logits: object, width: str = "V") -> None:
    """(..., `width`), or of any shape for ""."""
    check_is_tensor(function, name, logits)
    assert isinstance(logits, Tensor)
    if not logits.is_floating_point():
        raise TypeError(f"{function}: {name} must be floating point, got {logits.dtype}")
    if width and (logits.dim() < 1 or logits.shape[-1] < 1):
        raise ValueError(
            f"{function}: {name} must be (..., {width}), {width} >= 1, got {tuple(logits.shape)}"
        )


def check_labels_and_weight(
    function: str, labels: Tensor | None, row_weight: Tensor | None, ce_weight: float
) -> None:
    if ce_weight != 0 and labels is None:
        raise ValueError(f"{function}: labels are needed for ce_weight = {ce_weight}, got None")
    if labels is not None:
        check_is_integers(function, "labels", labels)
    if row_weight is not None:
        check_is_tensor(function, "row_weight", row_weight)
        if not row_weight.is_floating_point():
            raise TypeError(
                f"{function}: row_weight must be floating point, got {row_weight.dtype}"
            )


def check_is_integers(function: str, name: str, tensor: Tensor) -> None:
    check_is_tensor(function, name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{function}: {name} must be integers, got {tensor.dtype}")


def check_beside(
    function: str,
    name: str,
    tensor: Tensor | None,
    student: Tensor,
    per_row: bool = True,
    whose: str = "student_logits'",
) -> None:
    """A tensor of one element a row, or of one vector a row, beside the rows of `student`."""
    if tensor is None:
        return
    leading = student.shape[:-1]
    shape = tensor.shape if per_row else tensor.shape[:-1]
    if shape != leading:
        raise ValueError(
            f"{function}: {name} must have {whose} leading shape {tuple(leading)},"
            f" got {tuple(shape)}"
        )
    if tensor.device != student.device:
        raise ValueError(
            f"{function}: {name} must be on {whose} device {student.device}, got {tensor.device}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {name} must not require a gradient, which goes to the student alone;"
            f" pass {name}.detach()"
        )


def readable(values: Tensor) -> bool:
    """Whether there are values to look at, which a trace and torch.vmap have none of."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (traced or values.is_meta)


def valid_rows(
    function: str,
    student: Tensor,
    labels: Tensor | None,
    V: int,
    ignore_index: int,
    look: bool = True,
) -> Tensor:
    """Which rows of `student` are not ignored. A label out of range is an error, where we may look
    at values: on a GPU that is to wait for it."""
    if labels is None:
        return torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    labels = labels.to(torch.int64)
    valid = labels != ignore_index
    if not look:
        return valid
    outside = valid & ((labels < 0) | (labels >= V))
    if readable(labels) and bool(outside.any()):
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{function}: labels must be in [0, {V}) or ignore_index = {ignore_index},"
            f" got {int(labels.flatten()[row])} at row {row}"
        )
    return valid


def weigh_rows(
    row_weight: Tensor | None, reduction: str, valid: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The weights of rows with the reduction's factor in them, counted on their device; None for
    ones."""
    weight = None if row_weight is None else row_weight.to(dtype)
    if reduction not in ("mean", "batchmean"):
        return weight
    rows = valid.sum().clamp(min=1) if reduction == "mean" else max(1, valid.numel())
    weight = valid.new_ones(valid.shape, dtype=dtype) if weight is None else weight
    return weight / rows


def sum_rows(loss: Tensor) -> Tensor:
    return loss.sum(dtype=torch.float64).to(loss.dtype)


def read_rows(
    logits: tuple[Tensor, ...], grad: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, int], list[Strides]]:
    """The logits, copied where two strides do not address their rows, and what row_strides() says
    of them and of grad, the last, which is logits' own or lies as their copies do."""
    if row_strides(*logits) is None:
        logits = tuple(part.contiguous() for part in logits)
    found = row_strides(*logits) if grad is None else row_strides(*logits, grad)
    assert found is not None  # a gradient of its own is contiguous
    return logits, *found


def row_strides(*tensors: Tensor) -> tuple[tuple[int, int], list[Strides]] | None:
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
