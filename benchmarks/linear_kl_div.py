"""Cases of the losses from hidden states: (N, E) rows, a (V, E) head, and all three gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import xlstm_kernels as xk

from . import peers
from .problem import FORWARD_BACKWARD, Bound, Case, Tensors, Variant

WRT = ("hidden", "weight")
# By operation: the inputs that make its target.
TEACHER = ("teacher_hidden", "teacher_weight")
TARGETS = {
    "linear_kl_div": TEACHER,
    "linear_topk_kl_div": ("topk_logprobs", "topk_ids"),
    "linear_cross_entropy": ("labels",),
}
WORDS = 64  # of a teacher that is known by its likeliest
REFERENCE_ROWS = 64  # rows the reference holds in float64 at a time
Loss = Callable[[Tensors], Tensor]


def loss_and_gradients(op: str, N: int, E: int, V: int, dtype: torch.dtype) -> Case:
    """The sum over rows by N, forward and backward in one: forward KL of a teacher of the same
    size, or of its likeliest words, or cross-entropy. The peers hold all logits."""
    products = 4 if op == "linear_kl_div" else 3
    head, words = (N + V) * E * dtype.itemsize, min(WORDS, V)
    target_bytes = {
        "linear_kl_div": head,
        "linear_topk_kl_div": N * words * (dtype.itemsize + torch.int64.itemsize),
        "linear_cross_entropy": N * torch.int64.itemsize,
    }
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
        moved_bytes=2 * head + target_bytes[op],  # the inputs, and gradients as large as the head
    )


def _variant(name: str, loss: Loss, ours: bool = False) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        return Bound(lambda: (loss(tensors),), {name: tensors[name] for name in WRT})

    return Variant(name, bind, ours=ours)


def _fused(backend: str) -> Loss:
    def loss(t: Tensors) -> Tensor:
        op = next(op for op, target in TARGETS.items() if target[0] in t)
        arguments = (t[name] for name in (*WRT, *TARGETS[op]))
        return getattr(xk, op)(*arguments, reduction="batchmean", backend=backend)

    return loss


def _eager(t: Tensors) -> Tensor:
    """The logits of all rows in the dtype of the head, as a linear layer makes them."""
    student = t["hidden"] @ t["weight"].mT
    if "topk_ids" in t:
        return peers.tail_kl_div(student, t["topk_logprobs"], t["topk_ids"])
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
    elif "topk_ids" in plain:
        loss = xk.topk_kl_div(student, plain["topk_logprobs"], plain["topk_ids"], **how)
    else:
        loss = xk.kl_div(student, plain["teacher_hidden"] @ plain["teacher_weight"].mT, **how)
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
    teacher = hidden + 0.1 * torch.randn(N, E, generator=draw)
    if op == "linear_kl_div":
        return found | {"teacher_hidden": teacher, "teacher_weight": weight.clone()}
    logprobs, ids = (teacher @ weight.mT).log_softmax(-1).topk(min(WORDS, V))
    return found | {"topk_logprobs": logprobs, "topk_ids": ids}
