"""Hand-written LSTMs, a loop over steps in Python, in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .recognise import Plan, fill, gather, is_as_recognised, recognise, run_kernel
from .swap import Found, Swap, Swapped, fused_backend, no_kernel, swapped_class

# Where one kernel is faster than the loop, measured on one core of an AVX-512 Xeon for B 1 to 256,
# hidden sizes 64 to 512: from some steps on, as a call costs what four to six steps of the loop do;
# in training with so many units in all, both spend their time in the same products.
SHORTEST = 8
MOST_TRAINED_UNITS = 64 * 512


class FusedLoop(Swapped):
    """The swapped layer; a call that was not recognised runs the layer's own loop."""

    added = ("_plan",)
    _plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._plan
        call = dict(zip(plan.parameters, args, strict=False)) | kwargs
        x, state = (*(call.get(name) for name in plan.parameters), None)[:2]
        known = len(call) == len(args) + len(kwargs) and set(call) <= set(plan.parameters)
        if not (known and is_as_recognised(self, plan)):
            return self.replaced.forward(self, *args, **kwargs)
        weights = gather(self, plan)
        if not _fits(plan, weights, x, state):
            return self.replaced.forward(self, *args, **kwargs)
        assert isinstance(x, Tensor)
        return fill(plan.form, run_kernel(plan, weights, x, state).named(plan.time_first))


def _fits(plan: Plan, weights: list[Tensor], x: Any, state: Any) -> bool:
    if (
        not isinstance(x, Tensor)
        or not x.is_cpu
        or x.dim() != 3
        or x.shape[-1] != weights[0].shape[1]
    ):
        return False
    T, B = x.shape[:2] if plan.time_first else (x.shape[1], x.shape[0])
    if T < SHORTEST or B == 0 or (state is not None) not in plan.stateful:
        return False
    trained = torch.is_grad_enabled() and (x.requires_grad or weights[0].requires_grad)
    if trained and B * weights[1].shape[1] >= MOST_TRAINED_UNITS:
        return False
    if state is None:
        return True
    wanted = (B, weights[1].shape[1])
    return isinstance(state, (tuple, list)) and [getattr(s, "shape", None) for s in state] == [
        wanted,
        wanted,
    ]


def find(layer: nn.Module) -> Found:
    plan = recognise(layer)
    if plan is None or isinstance(plan, str):
        return plan
    weight = gather(layer, plan)[0]
    backend = fused_backend("recurrence", weight, weight, "lstm")
    if backend is None:
        return no_kernel("lstm", weight)
    which = f"{SHORTEST} steps or more, gates {plan.order}"
    return Swap(swapped_class(FusedLoop, type(layer)), backend, which, {"_plan": plan})
