"""Cases of the losses from hidden states: (N, E) rows, a (V, E) head, and all three gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import xlstm_kernels as xk

from .problem import FORWARD_BACKWARD, Bound, Case, Tensors, Variant

WRT = ("hidden", "weight")
TEACHER = ("teacher_hidden", "teacher_weight")
REFERENCE_ROWS = 64  # rows the reference holds in float64 at a time
Loss = Callable[[Tensors], Tensor]


def loss_and_gradients(op: str, N: int, E: int, V: int, dtype: torch.dtype) -> Case:
    """The sum over rows by N, forward and backward in one: forward KL of a teacher of the same
    size, or cross-entropy. The peers hold all logits."""
    products = 4 if op == "linear_kl_div" else 3
    matrices = 2 if op == "linear_kl_div" else 1
    inputs = matrices * (N + V) * E * dtype.itemsize
    labels = 0 if op == "linear_kl_div" else N * torch.int64.itemsize
    return Case(
        op=op,
        shape=f"N{N} E{E} V{V}",
        dtype=dtype,
        direction=FORWARD_BACKWARD,
        inputs=lambda draw: _inputs(op, draw, N, E, V),
        outputs=("loss",),
        wrt=WRT,
        reference=_reference,
        variants=(
            _variant("cpu", _fused("cpu"), ours=True),
            _variant("eager", _eager),
            Variant("products alone", _bind_products),
        ),
        flops=2 * products * N * E * V,
        moved_bytes=inputs + labels + (N + V) * E * dtype.itemsize,
    )


def _variant(name: str, loss: Loss, ours: bool = False) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        return Bound(lambda: (loss(tensors),), {name: tensors[name] for name in WRT})

    return Variant(name, bind, ours=ours)


def _fused(backend: str) -> Loss:
    def loss(t: Tensors) -> Tensor:
        how = {"reduction": "batchmean", "backend": backend}
        if "labels" in t:
            return xk.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], **how)
        return xk.linear_kl_div(*(t[name] for name in (*WRT, *TEACHER)), **how)

    return loss


def _eager(t: Tensors) -> Tensor:
    """The logits of all rows in the dtype of the head, as a linear layer makes them."""
    student = t["hidden"] @ t["weight"].mT
    if "labels" in t:
        return F.cross_entropy(student, t["labels"])
    teacher = t["teacher_hidden"] @ t["teacher_weight"].mT
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")


class _Products(torch.autograd.Function):
    """What a loss cannot do without: logits in forward, and products with `dz` in backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, dz: Tensor, x: Tensor, w: Tensor, *teacher: Tensor):
        ctx.save_for_backward(dz, x, w)
        logits = torch.empty_like(dz)
        for head in ((x, w), teacher) if teacher else ((x, w),):
            torch.mm(head[0], head[1].mT, out=logits)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):
        dz, x, w = ctx.saved_tensors
        return None, None, dz @ w, dz.mT @ x, *(None,) * (len(ctx.needs_input_grad) - 4)


def _bind_products(case: Case, tensors: Tensors) -> Bound:
    """torch's products in the case's dtype, of a gradient by logits computed beforehand."""
    compute = torch.promote_types(case.dtype, torch.float32)
    plain = {
        name: t.detach().to(compute) if t.is_floating_point() else t for name, t in tensors.items()
    }
    student = (plain["hidden"] @ plain["weight"].mT).requires_grad_()
    how = {"reduction": "batchmean", "backend": "cpu"}
    if "labels" in plain:
        loss = F.cross_entropy(student, plain["labels"])
    else:
        teacher = plain["teacher_hidden"] @ plain["teacher_weight"].mT
        loss = xk.kl_div(student, teacher, **how)
    dz = torch.autograd.grad(loss, student)[0].to(case.dtype)
    given = loss.detach(), dz, tensors["hidden"], tensors["weight"]
    teacher_head = [tensors[name] for name in TEACHER if name in tensors]
    return Bound(
        lambda: (_Products.apply(*given, *teacher_head),), {name: tensors[name] for name in WRT}
    )


def _reference(case: Case, tensors: Tensors) -> Tensors:
    """The reference's loss and gradients, some rows at a time; the weight's is summed unrounded."""
    N, loss = tensors["hidden"].shape[0], _fused("reference")
    weight = tensors["weight"].detach().requires_grad_()
    found = {"loss": torch.zeros(()), "dhidden": torch.empty_like(tensors["hidden"])}
    total = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for begin in range(0, N, REFERENCE_ROWS):
        rows = slice(begin, begin + REFERENCE_ROWS)
        part = {n: t if "weight" in n else t[rows] for n, t in tensors.items()}
        part["hidden"] = part["hidden"].detach().requires_grad_()
        value = loss({**part, "weight": weight}) * (len(part["hidden"]) / N)
        found["dhidden"][rows], dweight = torch.autograd.grad(value, (part["hidden"], weight))
        found["loss"] = found["loss"] + value.detach()
        total += dweight
    return {**found, "dweight": total.to(weight.dtype)}


def _inputs(op: str, draw: torch.Generator, N: int, E: int, V: int) -> Tensors:
    """Logits with a spread of 3 nats; the teacher's are a tenth of it apart."""
    hidden = torch.randn(N, E, generator=draw)
    weight = torch.randn(V, E, generator=draw).mul_(3 / E**0.5)
    found = {"hidden": hidden, "weight": weight}
    if op == "linear_cross_entropy":
        return found | {"labels": torch.randint(0, V, (N,), generator=draw)}
    apart = torch.randn(N, E, generator=draw)
    return found | {"teacher_hidden": hidden + 0.1 * apart, "teacher_weight": weight.clone()}
