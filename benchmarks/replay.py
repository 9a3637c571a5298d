"""Layers that take no time: they give back what they once computed, forward and backward. What is
left of a model's time then is what no kernel can take away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class _Recorded(torch.autograd.Function):
    """`outputs` whatever the inputs, and their gradients as recorded."""

    @staticmethod
    def forward(ctx: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], *inputs: Any):
        ctx.grads = grads
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Any):
        return None, None, *ctx.grads


class Replay:
    """Stands before a layer's `forward`. The first call is the layer's own; `finish` ends it."""

    def __init__(self, layer: nn.Module):
        self.layer, self.forward = layer, layer.forward
        self.outputs: list[Tensor] = []
        self.structure: Any = None
        self.input_grads: dict[int, Tensor] = {}
        self.weight_grads: dict[str, Tensor] = {}
        self.finished = False
        layer.forward = self

    def finish(self, weight_grads: dict[str, Tensor]) -> None:
        """After the recorded call's backward; gradients of the layer's weights by their names."""
        self.weight_grads = weight_grads
        self.finished = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values, structure = pytree.tree_flatten((args, kwargs))
        return self._replay(values) if self.finished else self._record(values, structure)

    def _record(self, values: list[Any], structure: Any) -> Any:
        for at, value in enumerate(values):
            if isinstance(value, Tensor) and value.requires_grad:
                values[at] = value.view_as(value)  # its gradient is what this layer adds
                values[at].register_hook(lambda grad, at=at: self.input_grads.update({at: grad}))
        args, kwargs = pytree.tree_unflatten(values, structure)
        self.outputs, self.structure = pytree.tree_flatten(self.forward(*args, **kwargs))
        return pytree.tree_unflatten(self.outputs, self.structure)

    def _replay(self, values: list[Any]) -> Any:
        inputs = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        grads = [
            self.input_grads.get(at)
            for at, v in enumerate(values)
            if isinstance(v, Tensor) and v.requires_grad
        ]
        for name, weight in self.layer.named_parameters():
            if weight.requires_grad:
                inputs.append(weight)
                grads.append(self.weight_grads[name])
        outputs = list(self.outputs)
        given = [at for at, output in enumerate(outputs) if isinstance(output, Tensor)]
        made = _Recorded.apply([outputs[at] for at in given], grads, *inputs)
        for at, output in zip(given, made, strict=True):
            outputs[at] = output
        return pytree.tree_unflatten(outputs, self.structure)
