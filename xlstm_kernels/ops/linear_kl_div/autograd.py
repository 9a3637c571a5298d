"""Autograd of the linear losses: when gradients are computed, and that none is changed twice.

A reduced loss computes them in its forward, chunk by chunk, while the logits are there; the first
backward scales and hands them over, a later one computes them again. The rows of reduction "none"
have incoming gradients of their own: they scale the rows of hidden's gradient, which forward has
then, but a weight's gradient is a sum over rows, which waits for backward and a second pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kl_div.op import scale
from ..kl_div.options import Options, unknown_numbers, without_numbers
from . import op
from .inputs import DIFFERENTIABLE, Inputs, Settings

Grads = tuple[Tensor | None, ...]


def linear_loss(inputs: Inputs, settings: Settings, backend: str) -> Tensor:
    """The loss, differentiable by hidden, weight and bias."""
    if (numbers := unknown_numbers(settings.options)) is not None:
        options = Options(*without_numbers(settings.options))
        inputs, settings = inputs._replace(numbers=numbers), settings._replace(options=options)
    parts = (getattr(inputs, name) for name in DIFFERENTIABLE)
    wanted = [part is not None and part.requires_grad for part in parts]
    if not (torch.is_grad_enabled() and any(wanted)):
        return _forward(inputs, settings, [False] * len(wanted), backend)[0]
    function = TracedLinearLoss if torch.compiler.is_compiling() else LinearLoss
    return function.apply(settings, wanted, backend, *inputs)


def _forward(inputs: Inputs, settings: Settings, wanted: list[bool], backend: str) -> list[Tensor]:
    options, *others, shard = settings
    call = *inputs, *options, *others, wanted
    if shard is None:
        return op.forward(*call, backend)
    return op.LINEAR_KL_DIV.module(backend).forward(*call, shard=shard)


def _at_once(inputs: Inputs, settings: Settings, wanted: list[bool]) -> bool:
    """Whether forward computes the gradients. float16 waits for backward, as in kl_div: a loss
    scale is there to lift them into float16's range."""
    if inputs.hidden.dtype == torch.float16:
        return False
    return settings.options.reduction != "none" or not any(wanted[1:])


def _gradients(
    dloss: Tensor,
    inputs: Inputs,
    settings: Settings,
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    """In a pass of their own, with `dloss` folded into the rows' weights."""
    weight = dloss if inputs.row_weight is None else dloss * inputs.row_weight.to(dloss.dtype)
    inputs = inputs._replace(row_weight=weight.expand(inputs.hidden.shape[:-1]))
    return _forward(inputs, settings, wanted, backend)[1:]


def _in_place(found: list[Tensor], wanted: list[bool]) -> Grads:
    """A gradient, or None, for each of DIFFERENTIABLE."""
    remaining = iter(found)
    return tuple(next(remaining) if want else None for want in wanted)


class LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        wanted: list[bool],
        backend: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        at_once = wanted if _at_once(inputs, settings, wanted) else [False] * len(wanted)
        loss, *found = _forward(inputs, settings, at_once, backend)
        ctx.save_for_backward(*tensors)
        ctx.ready, ctx.call = found, (settings, wanted, backend)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Grads:
        grads = LinearLossGrad.apply(dloss, ctx.ready, *ctx.call, *ctx.saved_tensors)
        return (*(None,) * len(ctx.call), *grads, *(None,) * (len(Inputs._fields) - len(grads)))


class LinearLossGrad(torch.autograd.Function):
    """The gradients as a function of their own, so that differentiating them is an error, not a
    zero."""

    @staticmethod
    def forward(
        ctx: Any,
        dloss: Tensor,
        ready: list[Tensor],
        settings: Settings,
        wanted: list[bool],
        backend: str,
        *tensors: Tensor | None,
    ) -> Grads:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        ctx.function, ctx.backend = inputs.function, backend
        if ready:
            found = list(ready)
            ready.clear()
            for grad in found:
                scale(grad, dloss, backend)
        else:
            found = _gradients(dloss, inputs, settings, wanted, backend)
        return _in_place(found, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        raise NotImplementedError(
            f"{ctx.function}: backend {ctx.backend!r} has no second derivative;"
            " use backend='reference'"
        )


class TracedLinearLoss(torch.autograd.Function):
    """For torch.compile: no state beyond saved tensors, nothing in place."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        wanted: list[bool],
        backend: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        ctx.at_once = _at_once(inputs, settings, wanted)
        at_once = wanted if ctx.at_once else [False] * len(wanted)
        loss, *found = _forward(inputs, settings, at_once, backend)
        ctx.save_for_backward(*(found if ctx.at_once else tensors))
        ctx.call = settings, wanted, backend
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Grads:
        settings, wanted, backend = ctx.call
        if ctx.at_once:
            factor = dloss.unsqueeze(-1) if settings.options.reduction == "none" else dloss
            found = [(grad * factor).to(grad.dtype) for grad in ctx.saved_tensors]
        else:
            inputs = Inputs(*ctx.saved_tensors)
            found = _gradients(dloss, inputs, settings, wanted, backend)
        grads = _in_place(found, wanted)
        return (*(None,) * len(ctx.call), *grads, *(None,) * (len(Inputs._fields) - len(grads)))
