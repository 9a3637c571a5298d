"""`xk.kl_div`: checks, autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import check_is_integer, check_is_number, check_is_tensor
from . import op, reference
from .options import DIVERGENCES, PLANNED_DIVERGENCES, REDUCTIONS, Options


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    inplace_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL divergence between the softmaxes of logits, mixed with hard-label cross-entropy.

    With p = softmax(teacher / T), q = softmax(student / T) and w the row's weight, a row's loss is
    ``w * (kl_weight * T**2 * KL + ce_weight * CE)``. KL is KL(p|q) forward or KL(q|p) reverse; CE
    is the cross-entropy of softmax(student), at temperature 1, with the row's label.

    Args:
        student_logits: (..., V). float64, float32, bfloat16 or float16. Views whose rows are
            contiguous, such as ``logits[:, :-1]``, are read in place.
        teacher_logits: (..., V'), the same leading shape, any of those dtypes. Where V' is not V,
            the columns beyond the narrower count as -inf. It must not require a gradient.
        labels: (...) integers in [0, V) or ignore_index; needed if ce_weight != 0. When given, a
            row labelled ignore_index contributes nothing, to no part of the loss.
        divergence: "forward" or "reverse".
        beta: mixing weight of the divergences "js" and "skew", which are not here yet.
        temperature: T > 0.
        ce_weight, kl_weight: weights of the two parts.
        row_weight: (...) weight of each row; it must not require a gradient.
        reduction: "mean", the sum over rows divided by the number of rows not ignored, whatever
            their weights; "sum"; "batchmean", the sum divided by the number of all rows; "none".
        inplace_grad: write the gradient over student_logits, which must be the result of another
            operation and not be used again: it needs no memory then, and backward runs only once.
            Without a gradient to compute, with backend "reference" and under torch.compile, which
            plans memory itself, it changes nothing.
        backend: "auto", or one of "reference", "cpu"; a named backend runs or raises.

    Returns:
        The loss, (...) for reduction "none": float32, float64 for float64 logits; sums are in that
        dtype too. The gradient goes to student_logits alone. A masked logit, -inf, has probability
        0: the forward divergence is inf where the teacher has mass and the student is masked, the
        reverse one where the student has mass and the teacher is masked (its gradient is then NaN).
        A row that is wholly masked, or ignored, or of weight 0, gives loss 0 and gradient 0; NaN
        and inf stay in their row of loss and gradient. Without any row the loss is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Source: Hinton, Vinyals & Dean, arXiv 1503.02531.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> student = torch.randn(2, 7, 100, requires_grad=True)
        >>> loss = xk.kl_div(student, torch.randn(2, 7, 100), temperature=2.0)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 7, 100])
    """
    options = Options(divergence, temperature, ce_weight, kl_weight, ignore_index, reduction)
    _check_options(options, beta)
    _check_tensors(student_logits, teacher_logits, labels, row_weight, ce_weight)
    chosen = op.KL_DIV.resolve(backend, student_logits, teacher_logits)
    tensors = student_logits, teacher_logits, labels, row_weight
    if chosen == "reference":
        return reference.forward(*tensors, options)
    if not (torch.is_grad_enabled() and student_logits.requires_grad):
        return op.forward(*tensors, *options, False, chosen.value)[0]
    if torch.compiler.is_compiling():
        return TracedKlDiv.apply(*tensors, options, chosen.value)
    if inplace_grad:
        _check_inplace(student_logits, teacher_logits)
        return InplaceKlDiv.apply(*tensors, options, chosen.value)
    return KlDiv.apply(*tensors, options, chosen.value)


class KlDiv(torch.autograd.Function):
    """The first backward hands over the gradient that forward computed; a later one computes it
    again from the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_weight: Tensor | None,
        options: Options,
        backend: str,
    ) -> Tensor:
        tensors = student, teacher, labels, row_weight
        loss, *grad = op.forward(*tensors, *options, _at_once(student), backend)
        ctx.save_for_backward(*tensors)
        ctx.grad, ctx.options, ctx.backend = grad, options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dstudent = KlDivGrad.apply(dloss, *ctx.saved_tensors, ctx.grad, ctx.options, ctx.backend)
        return dstudent, None, None, None, None, None


class KlDivGrad(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it is an error, not a zero."""

    @staticmethod
    def forward(
        ctx: Any,
        dloss: Tensor,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_weight: Tensor | None,
        ready: list[Tensor],
        options: Options,
        backend: str,
    ) -> Tensor:
        ctx.backend = backend
        if ready:
            grad = ready.pop()
            op.scale(grad, dloss, backend)
            return grad
        return _scaled_gradient(dloss, student, teacher, labels, row_weight, options, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE.format(ctx.backend))


class InplaceKlDiv(torch.autograd.Function):
    """Forward leaves the gradient in student's storage; the one backward scales it there."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_weight: Tensor | None,
        options: Options,
        backend: str,
    ) -> Tensor:
        loss = op.overwrite(student, teacher, labels, row_weight, *options, backend)
        # Whoever saved these logits for a backward of its own must not find a gradient there.
        torch.autograd.graph.increment_version(student)
        ctx.grad, ctx.version, ctx.backend = [student.detach()], student._version, backend
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.grad:
            raise RuntimeError(
                "kl_div: with inplace_grad=True backward runs once, as the logits it came from are"
                " gone; use inplace_grad=False"
            )
        if ctx.grad[0]._version != ctx.version:
            raise RuntimeError(
                "kl_div: with inplace_grad=True student_logits hold the gradient until backward,"
                " but they were modified by an inplace operation after the loss"
            )
        # What the second derivative would be by, were there one.
        anchor = dloss.new_empty(0, requires_grad=torch.is_grad_enabled())
        dstudent = InplaceKlDivGrad.apply(dloss, anchor, ctx.grad, ctx.backend)
        return dstudent, None, None, None, None, None


class InplaceKlDivGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dloss: Tensor, anchor: Tensor, ready: list[Tensor], backend: str
    ) -> Tensor:
        ctx.backend = backend
        grad = ready.pop()
        op.scale(grad, dloss, backend)
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE.format(ctx.backend))


class TracedKlDiv(torch.autograd.Function):
    """For torch.compile: no state beyond saved tensors, nothing in place."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_weight: Tensor | None,
        options: Options,
        backend: str,
    ) -> Tensor:
        tensors = student, teacher, labels, row_weight
        at_once = _at_once(student)
        loss, *grad = op.forward(*tensors, *options, at_once, backend)
        ctx.save_for_backward(*(grad if at_once else tensors))
        ctx.at_once, ctx.options, ctx.backend = at_once, options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            (grad,) = ctx.saved_tensors
            dstudent = (grad * dloss.unsqueeze(-1)).to(grad.dtype)
        else:
            student, teacher, labels, row_weight = ctx.saved_tensors
            dstudent = _scaled_gradient(
                dloss, student, teacher, labels, row_weight, ctx.options, ctx.backend
            )
        return dstudent, None, None, None, None, None


def _at_once(student: Tensor) -> bool:
    """Whether forward computes the gradient. float16 waits for backward, which folds the incoming
    gradient in before rounding: a loss scale exists to lift these numbers into float16's range."""
    return student.dtype != torch.float16


def _scaled_gradient(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
    backend: str,
) -> Tensor:
    """The gradient from the logits, with `dloss` folded into the rows' weights in its own dtype:
    a loss scale is out of float16's range."""
    weight = dloss if row_weight is None else dloss * row_weight.to(dloss.dtype)
    weight = weight.expand(student.shape[:-1])
    return op.forward(student, teacher, labels, weight, *options, True, backend)[1]


_NO_SECOND_DERIVATIVE = "kl_div: backend {!r} has no second derivative; use backend='reference'"


def _check_options(options: Options, beta: float) -> None:
    numbers = {
        "temperature": options.temperature,
        "ce_weight": options.ce_weight,
        "kl_weight": options.kl_weight,
        "beta": beta,
    }
    for argument, number in numbers.items():
        check_is_number("kl_div", argument, number)
    check_is_integer("kl_div", "ignore_index", options.ignore_index)
    if options.divergence not in DIVERGENCES:
        here = " and ".join(repr(name) for name in DIVERGENCES)
        if options.divergence in PLANNED_DIVERGENCES:
            raise NotImplementedError(
                f"kl_div: divergence {options.divergence!r} is not implemented yet; {here} are"
            )
        raise ValueError(f"kl_div: divergence must be one of {here}, got {options.divergence!r}")
    if options.reduction not in REDUCTIONS:
        known = ", ".join(repr(name) for name in REDUCTIONS)
        raise ValueError(f"kl_div: reduction must be one of {known}, got {options.reduction!r}")
    if not 0 < options.temperature < float("inf"):
        raise ValueError(f"kl_div: temperature must be finite and > 0, got {options.temperature}")
    if not 0 <= beta <= 1:
        raise ValueError(f"kl_div: beta must be in [0, 1], got {beta}")


def _check_tensors(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    ce_weight: float,
) -> None:
    """Shapes, dtypes and devices; nothing here reads a tensor's values."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_is_tensor("kl_div", name, logits)
        if not logits.is_floating_point():
            raise TypeError(f"kl_div: {name} must be floating point, got {logits.dtype}")
        if logits.dim() < 1 or logits.shape[-1] < 1:
            raise ValueError(f"kl_div: {name} must be (..., V), V >= 1, got {tuple(logits.shape)}")
    if ce_weight != 0 and labels is None:
        raise ValueError(f"kl_div: labels are needed for ce_weight = {ce_weight}, got None")
    if labels is not None:
        check_is_tensor("kl_div", "labels", labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"kl_div: labels must be integers, got {labels.dtype}")
    if row_weight is not None:
        check_is_tensor("kl_div", "row_weight", row_weight)
        if not row_weight.is_floating_point():
            raise TypeError(f"kl_div: row_weight must be floating point, got {row_weight.dtype}")
    leading = student.shape[:-1]
    rows = (("labels", labels), ("row_weight", row_weight))
    for name, tensor in (("teacher_logits", teacher), *rows):
        if tensor is None:
            continue
        shape = tensor.shape[:-1] if tensor is teacher else tensor.shape
        if shape != leading:
            raise ValueError(
                f"kl_div: {name} must have student_logits' leading shape {tuple(leading)},"
                f" got {tuple(shape)}"
            )
        if tensor.device != student.device:
            raise ValueError(
                f"kl_div: {name} must be on student_logits' device {student.device},"
                f" got {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"kl_div: {name} must not require a gradient, which goes to student_logits alone;"
                f" pass {name}.detach()"
            )


def _check_inplace(student: Tensor, teacher: Tensor) -> None:
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "kl_div: inplace_grad=True overwrites student_logits, which must be the result of an"
            " operation, got a leaf that requires a gradient"
        )
    if any(s == 0 and n > 1 for s, n in zip(student.stride(), student.shape, strict=True)):
        raise ValueError(
            "kl_div: inplace_grad=True needs student_logits whose elements do not share memory,"
            f" got strides {student.stride()}"
        )
    if student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        raise ValueError(
            "kl_div: inplace_grad=True overwrites student_logits, which must not share memory with"
            " teacher_logits"
        )
