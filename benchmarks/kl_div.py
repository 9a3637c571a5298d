"""Cases of the distillation loss: KL of (N, V) logits, and the student's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

import xlstm_kernels as xk

from . import peers
from .problem import FORWARD_BACKWARD, Bound, Case, Tensors, Variant

TEMPERATURE = 2.0
REFERENCE_ROWS = 64  # rows the reference holds in float64 at a time


def loss_and_gradient(N: int, V: int, dtype: torch.dtype) -> Case:
    """Forward KL, batchmean, temperature 2, forward and backward in one.

    The student's logits are no leaf, as in a model, and the gradient is what `torch.autograd.grad`
    returns for them. In place, it lies in the logits' own storage; every variant's logits are put
    back before each call, outside the clock.
    """
    return Case(
        op="kl_div",
        shape=f"N{N} V{V}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        inputs=lambda draw: _inputs(draw, N, V),
        outputs=("loss",),
        wrt=("student",),
        reference=_reference,
        variants=(
            _ours("cpu", inplace_grad=False),
            _ours("cpu in place", inplace_grad=True),
            peers.eager_kl_div(TEMPERATURE),
            peers.compiled_kl_div(TEMPERATURE),
        ),
        flops=0,
        moved_bytes=3 * N * V * dtype.itemsize,  # read student and teacher, write the gradient
        restore=("student",),
    )


def _ours(name: str, inplace_grad: bool) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        student, teacher = tensors["student"], tensors["teacher"]
        how = {"inplace_grad": inplace_grad, "backend": "cpu"}
        return Bound(lambda: (_kl_div(student, teacher, "batchmean", **how),), {"student": student})

    return Variant(name, bind, ours=True)


def _kl_div(student: Tensor, teacher: Tensor, reduction: str, **how: object) -> Tensor:
    return xk.kl_div(student, teacher, temperature=TEMPERATURE, reduction=reduction, **how)


def _reference(case: Case, tensors: Tensors) -> Tensors:
    """The reference's loss and gradient, some rows at a time."""
    pristine, teacher = tensors["pristine student"], tensors["teacher"]
    N = pristine.shape[0]
    loss, gradient = 0.0, torch.empty_like(pristine)
    for begin in range(0, N, REFERENCE_ROWS):
        rows = slice(begin, begin + REFERENCE_ROWS)
        student = pristine[rows].detach().requires_grad_()
        part = _kl_div(student, teacher[rows], "sum", backend="reference") / N
        (gradient[rows],) = torch.autograd.grad(part, student)
        loss = loss + part.detach()
    return {"loss": loss, "dstudent": gradient}


def _inputs(draw: torch.Generator, N: int, V: int) -> Tensors:
    """Logits as language models give them: a few nats of spread, student and teacher alike."""
    teacher = torch.randn(N, V, generator=draw).mul_(3)
    return {"student": torch.randn(N, V, generator=draw).add_(teacher), "teacher": teacher}
