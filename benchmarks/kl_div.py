"""Cases of the distillation losses over (N, V) logits, with the student's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import xlstm_kernels as xk

from . import peers
from .problem import FORWARD_BACKWARD, Bound, Case, Tensors, Variant

TEMPERATURE = 2.0
REFERENCE_ROWS = 64  # rows the reference holds in float64 at a time

# (student, *target, reduction=, backend=, inplace_grad=) -> loss
Loss = Callable[..., Tensor]


def loss_and_gradient(N: int, V: int, dtype: torch.dtype, divergence: str = "forward") -> Case:
    """One divergence from a teacher's logits, batchmean, temperature 2."""
    return _case(
        "kl_div",
        f"N{N} V{V}" if divergence == "forward" else f"N{N} V{V} {divergence}",
        dtype,
        partial(xk.kl_div, divergence=divergence, temperature=TEMPERATURE),
        ("teacher",),
        lambda draw: _logits(draw, N, V),
        peers.kl_div(divergence, TEMPERATURE),
        moved_bytes=3 * N * V * dtype.itemsize,  # read student and teacher, write the gradient
    )


def topk_loss_and_gradient(N: int, V: int, K: int, dtype: torch.dtype) -> Case:
    """Forward KL from a teacher's K likeliest words and their tail, batchmean."""
    return _case(
        "topk_kl_div",
        f"N{N} V{V} K{K}",
        dtype,
        xk.topk_kl_div,
        ("logprobs", "ids"),
        lambda draw: _topk(draw, N, V, K),
        peers.topk_kl_div(),
        moved_bytes=2 * N * V * dtype.itemsize + N * K * (dtype.itemsize + 8),
    )


def _case(
    op: str,
    shape: str,
    dtype: torch.dtype,
    loss: Loss,
    target: Sequence[str],
    inputs: Callable[[torch.Generator], Tensors],
    others: tuple[Variant, ...],
    moved_bytes: int,
) -> Case:
    """Forward and backward in one, of a loss from the tensors that `target` names.

    The student's logits are no leaf, as in a model, and the gradient is what `torch.autograd.grad`
    returns for them. In place, it lies in the logits' own storage; every variant's logits are put
    back before each call, outside the clock.
    """
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        inputs=inputs,
        outputs=("loss",),
        wrt=("student",),
        reference=partial(_reference, loss, target),
        variants=(
            _ours("cpu", loss, target, inplace_grad=False),
            _ours("cpu in place", loss, target, inplace_grad=True),
            *others,
        ),
        flops=0,
        moved_bytes=moved_bytes,
        restore=("student",),
    )


def _ours(name: str, loss: Loss, target: Sequence[str], inplace_grad: bool) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        student, rest = tensors["student"], [tensors[name] for name in target]
        how = {"reduction": "batchmean", "inplace_grad": inplace_grad, "backend": "cpu"}
        return Bound(lambda: (loss(student, *rest, **how),), {"student": student})

    return Variant(name, bind, ours=True)


def _reference(loss: Loss, target: Sequence[str], case: Case, tensors: Tensors) -> Tensors:
    """The reference's loss and gradient, some rows at a time."""
    pristine = tensors["pristine student"]
    N = pristine.shape[0]
    total, gradient = 0.0, torch.empty_like(pristine)
    for begin in range(0, N, REFERENCE_ROWS):
        rows = slice(begin, begin + REFERENCE_ROWS)
        student = pristine[rows].detach().requires_grad_()
        rest = [tensors[name][rows] for name in target]
        part = loss(student, *rest, reduction="sum", backend="reference") / N
        (gradient[rows],) = torch.autograd.grad(part, student)
        total = total + part.detach()
    return {"loss": total, "dstudent": gradient}


def _logits(draw: torch.Generator, N: int, V: int) -> Tensors:
    """Logits as language models give them: a few nats of spread, student and teacher alike."""
    teacher = torch.randn(N, V, generator=draw).mul_(3)
    return {"student": torch.randn(N, V, generator=draw).add_(teacher), "teacher": teacher}


def _topk(draw: torch.Generator, N: int, V: int, K: int) -> Tensors:
    logits = _logits(draw, N, V)
    logprobs, ids = logits["teacher"].log_softmax(-1).topk(K)
    return {"student": logits["student"], "logprobs": logprobs, "ids": ids}
