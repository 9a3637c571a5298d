"""What in a teacher counts most: from its activations on a few batches, or from its weights alone.

Channels of the hidden width: their share of |x|^2 of what layers hand on, each token's x scaled to
one length. Heads and neurons: the mean square of what they give, times that of the weights which
read it. Layers: 1 - cos(x before, x after), as in ShortGPT (arXiv 2403.03853). Choosing by
activations is Minitron's way (arXiv 2407.14679), these measures are ours; with the principal
directions of the hidden width in place of channels it is SliceGPT's (arXiv 2401.15024), with one
rotation for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.models.families import Family


@dataclass
class Importance:
    """hidden_E: of channels; covariance_EE: of what layers hand on, None from weights alone.

    heads_LH and neurons_LF: of each layer's; layers_L: of layers, None from weights alone.
    """

    hidden_E: Tensor
    heads_LH: Tensor
    neurons_LF: Tensor
    covariance_EE: Tensor | None = None
    layers_L: Tensor | None = None


def of_weights(teacher: Any, family: Family) -> Importance:
    """Squares of weights alone, as if all activations had one size."""
    layers = getattr(teacher.base_model, family.layers)
    hidden_E = torch.zeros(teacher.config.hidden_size, dtype=torch.float64)
    for name, weight in teacher.named_parameters():
        axes = family.axes_of(name, teacher.config)
        if weight.dim() == 2 and "E" in axes:
            rest = 1 - axes.index("E")
            hidden_E += weight.detach().double().square().sum(rest).cpu()
    heads, neurons = (
        torch.stack([_squares(layer, module, family, teacher.config) for layer in layers])
        for module in (family.heads_out, family.neurons_out)
    )
    return Importance(hidden_E, _by_head(heads, teacher.config), neurons)


@torch.no_grad()
def of_activations(
    teacher: Any, family: Family, batches: Iterable[Tensor], covariance: bool
) -> Importance:
    """One forward pass of the teacher over each of `batches`, (B, T) ids.

    Of a family whose layers alone can be fewer, heads and neurons are left empty.
    """
    decoder, config = teacher.base_model, teacher.config
    layers = getattr(decoder, family.layers)
    stream = _Stream(config.hidden_size, len(layers), covariance)
    squares: dict[Any, Tensor] = {}

    def on_read(module: Any, args: Any) -> None:
        found = args[0].flatten(0, -2).float().square().sum(0)
        squares[module] = squares[module] + found if module in squares else found

    readers = {
        name: [layer.get_submodule(name) for layer in layers] if family.axes else []
        for name in (family.heads_out, family.neurons_out)
    }
    hooks = [m.register_forward_pre_hook(on_read) for ms in readers.values() for m in ms]
    for at, module in enumerate([*layers, getattr(decoder, family.last_norm)]):
        hooks.append(module.register_forward_pre_hook(partial(stream.add, at), with_kwargs=True))
    training = teacher.training
    teacher.eval()
    try:
        for ids_BT in batches:
            decoder(ids_BT.to(teacher.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
        teacher.train(training)

    def gathered(name: str) -> Tensor:
        rows = [
            squares[module].double().cpu() * _squares(layer, name, family, config)
            for layer, module in zip(layers, readers[name], strict=bool(readers[name]))
        ]
        return torch.stack(rows) if rows else torch.empty(0)

    heads, neurons = (gathered(name) for name in readers)
    return Importance(
        stream.hidden.diagonal() if covariance else stream.hidden,
        _by_head(heads, config) if family.axes else heads,
        neurons,
        stream.hidden if covariance else None,
        stream.change_L,
    )


class _Stream:
    """Sums over what layers hand on: hidden (E,) or (E, E), and how much each layer changes it."""

    def __init__(self, width: int, layers: int, covariance: bool):
        self.covariance = covariance
        self.hidden = torch.zeros((width, width) if covariance else width, dtype=torch.float64)
        self.change_L = torch.zeros(layers, dtype=torch.float64)
        self.before: Tensor | None = None

    def add(self, at: int, module: Any, args: Any, kwargs: Any) -> None:
        """A hook before layer `at`, or before the norm behind the last."""
        x_NE = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2).float()
        x_NE = x_NE / x_NE.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        self.hidden += (x_NE.T @ x_NE if self.covariance else x_NE.square().sum(0)).cpu()
        if at > 0:
            assert self.before is not None
            self.change_L[at - 1] += (1 - (x_NE * self.before).sum(-1)).sum().cpu()
        self.before = x_NE


def _squares(layer: Any, module: str, family: Family, config: Any) -> Tensor:
    """Of the weights that read each of a module's inputs."""
    axes = family.axes_of(f"{module}.weight", config)
    weight = layer.get_submodule(module).weight.detach().double()
    return weight.square().sum(axes.index("E")).cpu()


def _by_head(squares_LX: Tensor, config: Any) -> Tensor:
    return squares_LX.unflatten(1, (config.num_attention_heads, -1)).sum(-1)
