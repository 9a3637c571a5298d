"""Autograd of losses over rows of student logits, whatever their target is.

A loss is three operators over (student, *others), where `others` ends in labels and row_weight.
``forward(student, *others, *options, want_grad, backend)`` gives the loss and, where wanted, its
gradient by student, by each row's own for reduction "none". ``overwrite(student, *others, *options,
backend)`` leaves the gradient in student. ``scale(grad, factor, backend)`` multiplies rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import unknown_numbers, without_numbers

Others = tuple[Tensor | None, ...]


_NEVER: Any = None


class Operators(NamedTuple):
    forward: Callable[..., Any]
    overwrite: Callable[..., Any] = _NEVER  # where the loss is traced
    scale: Callable[..., Any] = _NEVER


# By public function. Each api.py adds its own. Those "by numbers", for torch.compile, have the
# options' numbers as the first of `others` (options.py).
LOSSES: dict[str, Operators] = {}


def row_loss(
    function: str,
    student: Tensor,
    others: Others,
    options: tuple[Any, ...],
    inplace_grad: bool,
    backend: str,
) -> Tensor:
    """The loss, differentiable by `student` alone. For `inplace_grad` see `check_inplace` first."""
    if (numbers := unknown_numbers(options)) is not None:
        function, others = f"{function} by numbers", (numbers, *others)
        options = without_numbers(options)
    if not (torch.is_grad_enabled() and student.requires_grad):
        return LOSSES[function].forward(student, *others, *options, False, backend)[0]
    if torch.compiler.is_compiling():
        return TracedLoss.apply(function, options, backend, student, *others)
    if inplace_grad:
        return InplaceLoss.apply(function, options, backend, student, *others)[0]
    return RowLoss.apply(function, options, backend, student, *others)


def runs_inplace(student: Tensor, inplace_grad: bool) -> bool:
    """Whether `row_loss` will write over student."""
    wanted = inplace_grad and torch.is_grad_enabled() and student.requires_grad
    return wanted and not torch.compiler.is_compiling()


def check_inplace(function: str, student: Tensor, **others: Tensor) -> None:
    """That student may be written over, and shares no memory with the tensors of these names."""
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{function}: inplace_grad=True overwrites student_logits, which must be the result of"
            " an operation, got a leaf that requires a gradient"
        )
    if any(s == 0 and n > 1 for s, n in zip(student.stride(), student.shape, strict=True)):
        raise ValueError(
            f"{function}: inplace_grad=True needs student_logits whose elements do not share"
            f" memory, got strides {student.stride()}"
        )
    if student.numel() == 0:  # nothing to share: every empty tensor is at address 0
        return
    for name, other in others.items():
        if student.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
            raise ValueError(
                f"{function}: inplace_grad=True overwrites student_logits, which must not share"
                f" memory with {name}"
            )


class RowLoss(torch.autograd.Function):
    """The first backward hands over the gradient that forward computed; a later one computes it
    again from the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        function: str,
        options: tuple[Any, ...],
        backend: str,
        student: Tensor,
        *others: Tensor | None,
    ) -> Tensor:
        call = student, *others, *options, _at_once(student), backend
        loss, *grad = LOSSES[function].forward(*call)
        ctx.save_for_backward(student, *others)
        ctx.grad, ctx.call = grad, (function, options, backend)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which a checkpoint hands out once
        dstudent = RowLossGrad.apply(dloss, ctx.grad, *ctx.call, *saved)
        return (None, None, None, dstudent, *(None,) * (len(saved) - 1))


class RowLossGrad(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it is an error, not a zero."""

    @staticmethod
    def forward(
        ctx: Any,
        dloss: Tensor,
        ready: list[Tensor],
        function: str,
        options: tuple[Any, ...],
        backend: str,
        student: Tensor,
        *others: Tensor | None,
    ) -> Tensor:
        ctx.function, ctx.backend = function, backend
        if ready:
            grad = ready.pop()
            LOSSES[function].scale(grad, dloss, backend)
            return grad
        return _scaled_gradient(dloss, function, options, backend, student, others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE.format(ctx.function, ctx.backend))


class InplaceLoss(torch.autograd.Function):
    """Forward leaves the gradient in student's storage; the one backward scales it there.

    Also returns an empty tensor. As a saved output it ties `InplaceLossGrad` to student, which is
    gone."""

    @staticmethod
    def forward(
        ctx: Any,
        function: str,
        options: tuple[Any, ...],
        backend: str,
        student: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        loss = LOSSES[function].overwrite(student, *others, *options, backend)
        # Whoever saved these logits for a backward of its own must not find a gradient there.
        torch.autograd.graph.increment_version(student)
        ctx.grad, ctx.version = [student.detach()], student._version
        ctx.function, ctx.backend, ctx.others = function, backend, len(others)
        tie = loss.new_empty(0)
        ctx.save_for_backward(tie)
        return loss, tie

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.grad:
            raise RuntimeError(
                f"{ctx.function}: with inplace_grad=True backward runs once, as the logits it came"
                " from are gone; use inplace_grad=False"
            )
        if ctx.grad[0]._version != ctx.version:
            raise RuntimeError(
                f"{ctx.function}: with inplace_grad=True student_logits hold the gradient until"
                " backward, but they were modified by an inplace operation after the loss"
            )
        (tie,) = ctx.saved_tensors
        dstudent = InplaceLossGrad.apply(dloss, tie, ctx.grad, ctx.function, ctx.backend)
        return (None, None, None, dstudent, *(None,) * ctx.others)


class InplaceLossGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dloss: Tensor, tie: Tensor, ready: list[Tensor], function: str, backend: str
    ) -> Tensor:
        ctx.function, ctx.backend = function, backend
        grad = ready.pop()
        LOSSES[function].scale(grad, dloss, backend)
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE.format(ctx.function, ctx.backend))


class TracedLoss(torch.autograd.Function):
    """For torch.compile: no state beyond saved tensors, nothing in place."""

    @staticmethod
    def forward(
        ctx: Any,
        function: str,
        options: tuple[Any, ...],
        backend: str,
        student: Tensor,
        *others: Tensor | None,
    ) -> Tensor:
        at_once = _at_once(student)
        loss, *grad = LOSSES[function].forward(student, *others, *options, at_once, backend)
        ctx.save_for_backward(*(grad if at_once else (student, *others)))
        ctx.at_once, ctx.others, ctx.call = at_once, len(others), (function, options, backend)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            (grad,) = ctx.saved_tensors
            dstudent = (grad * dloss.unsqueeze(-1)).to(grad.dtype)
        else:
            student, *others = ctx.saved_tensors
            function, options, backend = ctx.call
            dstudent = _scaled_gradient(dloss, function, options, backend, student, tuple(others))
        return (None, None, None, dstudent, *(None,) * ctx.others)


def _at_once(student: Tensor) -> bool:
    """Whether forward computes the gradient. float16 waits for backward, which folds the incoming
    gradient in before rounding: a loss scale exists to lift these numbers into float16's range."""
    return student.dtype != torch.float16


def _scaled_gradient(
    dloss: Tensor,
    function: str,
    options: tuple[Any, ...],
    backend: str,
    student: Tensor,
    others: Others,
) -> Tensor:
    """The gradient from the logits, with `dloss` folded into the rows' weights in its own dtype:
    a loss scale is out of float16's range."""
    *others_, row_weight = others
    weight = dloss if row_weight is None else dloss * row_weight.to(dloss.dtype)
    weight = weight.expand(student.shape[:-1])
    return LOSSES[function].forward(student, *others_, weight, *options, True, backend)[1]


_NO_SECOND_DERIVATIVE = "{}: backend {!r} has no second derivative; use backend='reference'"
