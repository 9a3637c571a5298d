"""What a case is: named inputs, variants that compute the same named results, and their cost."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
FORWARD, FORWARD_BACKWARD = "fwd", "fwd+bwd"

Tensors = dict[str, Tensor]


class UnavailableError(Exception):
    """A variant cannot run a case here; the message is the reason, and becomes the row."""


@dataclass(frozen=True)
class Bound:
    """A variant bound to its inputs: `call()` returns the case's outputs in the order of their
    names; `wrt` are the tensors that gradients are taken for."""

    call: Callable[[], tuple[Tensor, ...]]
    wrt: Tensors


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. Ours must pass the gate; a peer is what we are compared with."""

    name: str
    bind: Callable[[Case, Tensors], Bound]
    ours: bool = False
    compiles: bool = False  # calls torch.compile: many seconds before the first result


@dataclass(frozen=True)
class Case:
    """One operation on one shape, dtype and direction.

    inputs(generator) makes them in float32; `prepare` rounds them to `dtype`. A gradient flows
    back from `outputs[0]`, seeded by the input "d<name>", or by 1 if it is a scalar. flops and
    moved_bytes count the least that the mathematics needs: each input read and each result written
    once; 0 flops where multiply-adds are not what the operation is made of.
    """

    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    inputs: Callable[[torch.Generator], Tensors]
    outputs: tuple[str, ...]
    wrt: tuple[str, ...]
    reference: Callable[[Case, Tensors], Tensors]
    variants: tuple[Variant, ...]
    flops: int
    moved_bytes: int
    restore: tuple[str, ...] = ()  # inputs that a variant may overwrite
    float32: tuple[str, ...] = ()  # inputs that stay so whatever the case's dtype
    widened: float = 1.0  # factor on the budget; as in the operation's tests, which say why

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def id(self) -> str:
        return f"{self.op}-{self.direction}-{self.shape.replace(' ', '-')}-{self.dtype_name}"

    def prepare(self) -> Tensors:
        """The inputs in the case's dtype; seeded by op and shape, the same in each direction."""
        seed = zlib.crc32(f"{self.op} {self.shape}".encode())
        made = self.inputs(torch.Generator().manual_seed(seed))
        rounded = {n: t for n, t in made.items() if t.is_floating_point() and n not in self.float32}
        return made | {name: t.to(self.dtype) for name, t in rounded.items()}


class Trial:
    """A variant on tensors of its case: `run()` is what is timed, `reset()` is not.

    The differentiated inputs are not leaves of the graph, as in a model, and `torch.autograd.grad`
    returns the gradients. So no variant pays for a copy into `.grad`, and one that writes the
    gradient over its input may. Where the case restores inputs, it does so before every call of
    every variant, so that all of them find the caches in the same state.
    """

    def __init__(self, case: Case, variant: Variant, tensors: Tensors):
        self.case, self.variant = case, variant
        self.bound = variant.bind(case, tensors)
        self._wrt = tuple(self.bound.wrt.values())
        self._seed = tensors.get(f"d{case.outputs[0]}")
        self._restored = [(tensors[name], tensors[f"pristine {name}"]) for name in case.restore]
        self.run = self.bound.call if case.direction == FORWARD else self._forward_backward

    def reset(self) -> None:
        for tensor, pristine in self._restored:
            tensor.detach().copy_(pristine)

    def results(self) -> Tensors:
        """Every output and gradient of one call, by name."""
        self.reset()
        names = list(self.case.outputs)
        if self.case.direction == FORWARD_BACKWARD:
            names += [f"d{name}" for name in self.bound.wrt]
        return dict(zip(names, (t.detach() for t in self.run()), strict=True))

    def _forward_backward(self) -> tuple[Tensor, ...]:
        outputs = self.bound.call()
        return (*outputs, *torch.autograd.grad(outputs[0], self._wrt, self._seed))


def tracked(case: Case, tensors: Tensors) -> Tensors:
    """`tensors` ready for the case's direction: differentiated inputs require grad and are no
    leaves; "pristine <name>" holds what `reset` puts back."""
    ready = dict(tensors)
    if case.direction == FORWARD_BACKWARD:
        for name in case.wrt:
            leaf = tensors[name].detach().requires_grad_()
            ready[name] = leaf.clone()
    for name in case.restore:
        if ready[name] is tensors[name]:
            ready[name] = tensors[name].clone()
        ready[f"pristine {name}"] = tensors[name]
    return ready
