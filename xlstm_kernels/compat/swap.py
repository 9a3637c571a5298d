"""How a layer of another library is taken over: by its class alone.

A layer that is swapped becomes an instance of a subclass of its class, whose methods call our
operations on the parameters the layer has. So parameters, buffers, hooks, mode and the state dict
are the layer's own, references to it stay good, and its old class undoes the swap.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backends import OPS


class Swapped:
    """First base of every class that a swapped layer gets; the layer's own class is the second.

    Calls on tensors off the CPU, where a layer may have been moved since, run its own code.

    `replaced` is that class, `added` names what the swap put into the instance.
    """

    replaced: ClassVar[Any]
    added: ClassVar[tuple[str, ...]] = ()


_MADE: dict[tuple[type, type], type] = {}


def swapped_class(how: type[Swapped], replaced: type[nn.Module], name: str = "") -> type:
    """The class of a swapped layer: `how` before `replaced`. Layers of it can be copied and
    pickled, though no module has a name for it."""
    key = how, replaced
    if key not in _MADE:
        names = {
            "replaced": replaced,
            "__module__": replaced.__module__,
            "__doc__": how.__doc__,
            "__reduce_ex__": lambda layer, protocol: (_empty, (*key, name), *_state(layer)),
        }
        if "forward" in vars(how):
            names["forward"] = _with_signature_of(replaced, how)
        try:
            _MADE[key] = type(name or f"Fused{replaced.__name__}", key, names)
        # Whatever a class may do where it is derived from: __init_subclass__, a metaclass.
        except Exception as error:
            why = f"no class can be derived from its own: {_in_short(error)}"
            raise NotDerivable(why) from error
    return _MADE[key]


class NotDerivable(Exception):
    """Why a layer is left whose class lets none be derived from it."""


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def _with_signature_of(replaced: Any, how: Any) -> Any:
    """The forward of `how` with the names of arguments that torch.export and others ask for."""

    @functools.wraps(replaced.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return how.forward(self, *args, **kwargs)

    return forward


def _state(layer: Any) -> tuple[Any, ...]:
    """What the layer's class has pickled of an instance: it may define __getstate__."""
    return tuple(object.__reduce_ex__(layer, 2)[2:])


def _empty(how: type[Swapped], replaced: type[nn.Module], name: str) -> Any:
    cls: Any = swapped_class(how, replaced, name)
    return cls.__new__(cls)


@dataclass(frozen=True)
class Swap:
    """A layer that can be swapped: for which class, on which backend, and which calls run on it."""

    become: type
    backend: str
    which: str = "every call"
    attributes: Mapping[str, Any] = field(default_factory=dict)


# Why a cell is left that runs one step a call.
STEP = "measured: one step is no faster here; a module that loops over it is, or LSTMCell.unroll"

# Why a layer is left whose class has one that we know among its bases.
SUBCLASS = "a subclass may compute something else"

# What a library's `find(layer)` says of a layer of just a class in its KNOWN: a swap, or why not.
# None: a layer that nobody knows.
Found = Swap | str | None


def class_among(layer: nn.Module, known: Collection[str]) -> type[nn.Module] | None:
    """The layer's class or the nearest of its bases that is in `known`, by module and name: asking
    imports no library."""
    return next((c for c in type(layer).__mro__ if f"{c.__module__}.{c.__name__}" in known), None)


def fused_backend(op: str, tensor: Tensor, *call: Any) -> str | None:
    """The backend that `auto` takes for a call of the operation `op` on tensors like `tensor`; None
    where that would be the reference, no faster than what is there, and off the CPU, where nothing
    is measured yet."""
    backend = OPS[op].resolve("auto", tensor, *call).value
    return None if backend == "reference" or not tensor.is_cpu else backend


def no_kernel(op: str, tensor: Tensor) -> str:
    return f"no measured kernel for {op} on {tensor.device.type} tensors of {tensor.dtype}"


def swap_class(layer: nn.Module, swap: Swap) -> str | None:
    """None, or why the layer, which is then as it was, takes no other class."""
    try:
        layer.__class__ = swap.become
    # A __setattr__ of its own may refuse, or two memory layouts differ.
    except Exception as error:
        return f"it takes no other class: {_in_short(error)}"
    vars(layer).update(swap.attributes)
    return None


def restore_class(layer: Swapped) -> None:
    for name in layer.added:
        del vars(layer)[name]
    layer.__class__ = layer.replaced
