"""Which LSTM a module computes, found by running it.

Two `Linear(..., 4 * hidden)` or one `nn.LSTMCell` must hold all parameters. A copy of the module
then runs on random weights and inputs, and its outputs and gradients are compared with those of an
LSTM in plain torch, for each order of the gates and each layout.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.recurrence.api import lstm
from .swap import STEP

# Of a float32 probe against the kernel, which has another order of sums.
TOLERANCE = 1e-4
# Times the kernel's own error, where float32 has too few digits for that: gradients of gates that
# inputs saturate. Over 200 draws an LSTM's was at most 2.5 times as large.
AS_NEAR = 8
# Batch, steps, scale of the inputs, and whether every step has the same: the last counts c up to
# the number of steps, so that a bound on it shows.
LONG = 130
RUNS = ((3, 1, 1.0, False), (1, LONG, 1.0, False), (2, 5, 30.0, False), (2, LONG, 30.0, True))

# Attributes that a forward may compute with, but for those that every module has.
PLAIN = bool, int, float, complex, str, type(None)
OF_TORCH = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Plan:
    """How a layer computes its LSTM.

    Args:
        weights: paths, from the layer, of the input and the recurrent weight and of the biases.
        order: of the gates in the rows of the weights, as in "ifgo".
        time_first: x is (T, B, E), not (B, T, E).
        parameters: names of forward's parameters, x and the state.
        form: what forward returns, a name of `Steps` for each tensor.
        stateful: which calls are recognised: without a state, with (h, c).
        modules: classes of the modules within.
        numbers: of the layer and of each module within, the attributes that are plain values.
    """

    weights: tuple[str, ...]
    order: str = "ifgo"
    time_first: bool = False
    parameters: tuple[str, ...] = ()
    form: Any = None
    stateful: tuple[bool, ...] = ()
    modules: tuple[type, ...] = ()
    numbers: tuple[tuple[tuple[str, Any], ...], ...] = ()


@dataclass(frozen=True)
class Steps:
    """What an LSTM computes: h at all steps (B, T, D), the last h and c (B, D)."""

    h_BTD: Tensor
    h_BD: Tensor
    c_BD: Tensor

    def named(self, time_first: bool) -> dict[str, Tensor]:
        """Every tensor that a hand-written forward is known to return."""
        in_time = self.h_BTD.transpose(0, 1)
        same, turned = (in_time, self.h_BTD) if time_first else (self.h_BTD, in_time)
        found = {"h of all steps": same, "h of all steps, turned": turned}
        found |= {"h": self.h_BD, "c": self.c_BD}
        return found | {"h, lifted": self.h_BD.unsqueeze(0), "c, lifted": self.c_BD.unsqueeze(0)}


def gather(layer: Any, plan: Plan) -> list[Tensor]:
    """By attribute, so that torch.func.functional_call is seen."""
    return [reduce(getattr, path.split("."), layer) for path in plan.weights]


def blocks(plan: Plan, tensor: Tensor) -> Tensor:
    """The rows of a weight or bias, gates in the order i f z o: (4, D, ...)."""
    gates = tensor.view(4, -1, *tensor.shape[1:])
    if plan.order == "ifgo":
        return gates
    parts = gates.unbind(0)
    return torch.stack([parts[plan.order.index(gate)] for gate in "ifgo"])


def run_kernel(plan: Plan, weights: list[Tensor], x: Tensor, state: Any) -> Steps:
    weight_ih, weight_hh, *biases = weights
    D = weight_hh.shape[1]
    x_BTE = x.transpose(0, 1) if plan.time_first else x
    gates = F.linear(x_BTE, blocks(plan, weight_ih).flatten(0, 1))
    # Autocast rounds products; the loop's state stays as wide as it came.
    kept = x if state is None else state[1]
    gates = gates.to(torch.promote_types(gates.dtype, kept.dtype))
    y_BTHD, (h_BHD, c_BHD) = lstm(
        gates.view(*x_BTE.shape[:2], 4, 1, D),
        blocks(plan, weight_hh).unsqueeze(1),
        blocks(plan, sum(biases[1:], biases[0])).unsqueeze(1) if biases else None,
        None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1)),
    )
    dtype = y_BTHD.dtype
    return Steps(y_BTHD.squeeze(2), h_BHD.squeeze(1).to(dtype), c_BHD.squeeze(1).to(dtype))


def fill(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(form, str):
        return tensors[form]
    return type(form)(fill(part, tensors) for part in form)


@torch.inference_mode(False)
@torch.autocast("cpu", enabled=False)
def recognise(layer: nn.Module, seed: int = 0) -> Plan | str | None:
    """How the layer's forward runs an LSTM over a sequence, or why it is none that we know; None
    where its parameters are not those of an LSTM."""
    candidates = list(_weights(layer))
    if not candidates:
        return None
    why = _outside_of_the_weights(layer)
    if why is not None:
        return why
    try:
        probe = copy.deepcopy(layer)
    except Exception as error:
        return f"it cannot be copied to be tried: {error}"
    probe.to(device="cpu", dtype=torch.float32)
    for module in probe.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        draw = torch.Generator().manual_seed(seed)
        for parameter in probe.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.data = scale * _normal(draw, *parameter.shape)
            parameter.requires_grad_(True)
        return _Probe(probe, draw).run(candidates)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")


def _weights(layer: nn.Module) -> Iterator[Plan]:
    """The roles that the layer's parameters may have."""
    holders = []
    for path, module in layer.named_modules():
        if any(True for _ in module.parameters(recurse=False)) or module._buffers:
            holders.append((path and path + ".", module))
            if len(holders) > 2:
                return
    if len(holders) == 1 and type(holders[0][1]) is nn.LSTMCell and holders[0][0]:
        path, cell = holders[0]
        biases = ("bias_ih", "bias_hh") if cell.bias else ()
        found = [path + name for name in ("weight_ih", "weight_hh", *biases)]
        yield Plan(tuple(found), parameters=_parameters(layer), **_as_it_is(layer))
    elif len(holders) == 2 and all(type(module) is nn.Linear for _, module in holders):
        for (path, input_linear), (hidden_path, linear) in itertools.permutations(holders):
            rows = 4 * linear.in_features
            if linear.out_features == input_linear.out_features == rows:
                given = (path, input_linear), (hidden_path, linear)
                biases = tuple(p + "bias" for p, module in given if module.bias is not None)
                found = [path + "weight", hidden_path + "weight"]
                names = (*found, *biases)
                yield Plan(names, parameters=_parameters(layer), **_as_it_is(layer))


def _parameters(layer: nn.Module) -> tuple[str, ...]:
    """Names of the first two of forward, after self."""
    return tuple(inspect.signature(type(layer).forward).parameters)[1:3]


def _as_it_is(layer: nn.Module) -> dict[str, Any]:
    """What `is_as_recognised` looks at."""
    modules = list(layer.modules())
    # A Linear has sizes alone, and weights that say them too.
    numbers = tuple(
        tuple((k, v) for k, v in vars(module).items() if k not in OF_TORCH and type(v) in PLAIN)
        if type(module) is not nn.Linear
        else ()
        for module in modules
    )
    return {"modules": tuple(map(type, modules[1:])), "numbers": numbers}


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_as_recognised(layer: Any, plan: Plan) -> bool:
    """Whether the modules within compute what they did then: another may stand in the place of a
    Linear (an adapter, a quantised one), a hook may give it its weight (weight_norm, pruning), a
    scale or a rate of dropout may have been set."""
    modules = list(layer.modules())
    within = modules[1:]
    if tuple(map(type, within)) != plan.modules or any(map(has_hooks, within)):
        return False
    for module, numbers in zip(modules, plan.numbers, strict=True):
        for name, value in numbers:
            found = getattr(module, name, None)
            if found is not value and (type(found) is not type(value) or found != value):
                return False
    return True


def _outside_of_the_weights(layer: nn.Module) -> str | None:
    if type(layer).__call__ is not nn.Module.__call__:
        return "its __call__ may do more than its forward"
    for path, module in layer.named_modules():
        if path and has_hooks(module):
            return f"hooks on {path}, which would not run"
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return "some of its parameters are on the meta device"
    return None


class _Probe:
    """Runs of a copy of the layer beside runs of the LSTM that it may be."""

    def __init__(self, layer: nn.Module, draw: torch.Generator):
        self.layer, self.draw = layer, draw
        # Why it was not recognised; what a run says weighs more than that another form did not run.
        self.failures = {"ran": "", "did not run": ""}

    def run(self, candidates: list[Plan]) -> Plan | str:
        found = [plan for state in (False, True) for plan in self._identify(candidates, state)]
        if not found:
            failure = self.failures["ran"] or self.failures["did not run"]
            return STEP if any(map(self._is_step, candidates)) else failure
        plan = replace(found[0], stateful=tuple(dict.fromkeys(p.stateful[0] for p in found)))
        if any(replace(other, stateful=plan.stateful) != plan for other in found):
            return "what it returns depends on whether a state is given"
        for state, (B, T, scale, steady) in itertools.product(plan.stateful, RUNS):
            mode = self._differs(plan, B, T, scale, state, steady)
            if mode:
                return f"it differs from an LSTM in {mode} mode, {T} steps, inputs of {scale}"
        return plan

    def _identify(self, candidates: list[Plan], with_state: bool) -> Iterator[Plan]:
        """The first plan that explains what the layer returns for two sequences of five steps."""
        self.layer.eval()
        for plan, time_first in itertools.product(candidates, (False, True)):
            plan = replace(plan, time_first=time_first, stateful=(with_state,))
            x, state = self._inputs(plan, 2, 5, 1.0, with_state)
            got = self._call(x, state)
            if got is None:
                continue
            weights = gather(self.layer, plan)
            orders = ("ifgo",) if len(candidates) == 1 and "_ih" in plan.weights[0] else None
            for order in orders or map("".join, itertools.permutations("ifgo")):
                plan = replace(plan, order=order)
                with torch.no_grad():
                    named = run_kernel(plan, weights, x, state).named(time_first)
                form = _form(got, named)
                if form is not None:
                    yield replace(plan, form=form)
                    return
            self.failures["ran"] = "it computes no LSTM that we know"

    def _is_step(self, plan: Plan) -> bool:
        """Whether the layer takes x (B, E) and (h, c), and returns the next h and c."""
        x, (h, c) = self._inputs(plan, 2, 1, 1.0, True)
        x, got = x.squeeze(1), self._call(x.squeeze(1), (h, c))
        for order in map("".join, itertools.permutations("ifgo")):
            plan = replace(plan, order=order)
            want = run_kernel(plan, gather(self.layer, plan), x.unsqueeze(1), (h, c))
            if _form(got, {"h": want.h_BD, "c": want.c_BD}) is not None:
                return True
        return False

    def _inputs(self, plan: Plan, B: int, T: int, scale: float, with_state: bool) -> Any:
        weight_ih, weight_hh = gather(self.layer, plan)[:2]

        def normal(*shape: int) -> Tensor:
            return (scale * _normal(self.draw, *shape)).requires_grad_()

        D, E = weight_hh.shape[1], weight_ih.shape[1]
        x = normal(T, B, E) if plan.time_first else normal(B, T, E)
        return x, (normal(B, D), normal(B, D)) if with_state else None

    def _call(self, x: Tensor, state: Any) -> Any:
        """What the layer returns; None where it raises, or does more than return."""
        before = [dict(vars(module)) for module in self.layer.modules()]
        given = [x.detach().clone(), *(part.detach().clone() for part in state or ())]
        try:
            got = self.layer(x) if state is None else self.layer(x, state)
        except Exception as error:
            text = " ".join(str(error).split())
            self.failures["did not run"] = (
                f"it does not run on a (B, T, input) sequence: {text[:80]}"
            )
            return None
        after = [dict(vars(module)) for module in self.layer.modules()]
        if not all(_same_values(a, b) for a, b in zip(before, after, strict=True)):
            self.failures["ran"] = "its forward changes its attributes"
            return None
        if not all(map(torch.equal, given, (x, *(state or ())))):
            self.failures["ran"] = "its forward changes its arguments"
            return None
        return got

    def _differs(
        self, plan: Plan, B: int, T: int, scale: float, with_state: bool, steady: bool
    ) -> str:
        """The mode in which outputs or gradients (a layer may detach its state) are not an LSTM's;
        "" where they are."""
        x, state = self._inputs(plan, B, T, scale, with_state)
        if steady:
            time = 0 if plan.time_first else 1
            x = x.narrow(time, 0, 1).expand_as(x).detach().requires_grad_()
        leaves = [x, *(state or ()), *gather(self.layer, plan)]
        want = _with_gradients(self._lstm(plan, leaves), leaves)
        exact = None
        for mode in ("training", "evaluation"):
            self.layer.train(mode == "training")
            # Most of a long run is the gradient of the weights, the same in both modes.
            asked = leaves if T < LONG or mode == "training" else leaves[: -len(plan.weights)]
            wanted = want[: len(want) - len(leaves) + len(asked)]
            got = _with_gradients(_leaves(self._call(x, state)), asked)
            if len(got) != len(wanted):
                return mode
            if all(map(_near, got, wanted)):
                continue
            if exact is None:
                doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
                exact = _with_gradients(self._lstm(plan, doubles), doubles)
            if not all(map(_as_near, got, wanted, exact)):
                return mode
        return ""

    def _lstm(self, plan: Plan, leaves: list[Tensor]) -> list[Tensor]:
        """What the layer should return for x, the state and the weights in `leaves`."""
        count = len(leaves) - len(plan.weights)
        (x, *state), weights = leaves[:count], leaves[count:]
        steps = run_kernel(plan, weights, x, tuple(state) or None)
        return _leaves(fill(plan.form, steps.named(plan.time_first)))


def _with_gradients(outputs: list[Tensor] | None, leaves: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradient that a loss over them has for each leaf."""
    if outputs is None:
        return []
    loss = sum(((k + 1) * t.sin().sum() for k, t in enumerate(outputs)), torch.zeros(()))
    if not loss.requires_grad:
        return [*outputs, *map(torch.zeros_like, leaves)]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(t.detach() for t in outputs), *found]


def _same_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return before.keys() == after.keys() and all(after[name] is before[name] for name in before)


def _near(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape:
        return False
    error, size = (got - want).norm(), want.norm()
    return bool(error <= TOLERANCE * size + 1e-7)


def _as_near(got: Tensor, want: Tensor, exact: Tensor) -> bool:
    """Whether `got` is about as near to the exact result as `want`: both lack the same digits."""
    if got.shape != want.shape:
        return False
    error, size = (want - exact).norm(), exact.norm()
    return bool((got - exact).norm() <= AS_NEAR * error + TOLERANCE * size + 1e-7)


def _form(got: Any, named: Mapping[str, Tensor]) -> Any:
    """`got` with the names of its tensors in their places; None where one has no name."""
    if isinstance(got, Tensor):
        return next((name for name, tensor in named.items() if _near(got, tensor)), None)
    if type(got) not in (tuple, list):
        return None
    parts = [_form(part, named) for part in got]
    return None if not parts or None in parts else type(got)(parts)


def _leaves(value: Any) -> Any:
    """The tensors of nested tuples and lists; None where something else is among them."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) not in (tuple, list):
        return None
    parts = [_leaves(part) for part in value]
    return None if None in parts else [leaf for part in parts for leaf in part]
