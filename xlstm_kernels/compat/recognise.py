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

from .swap import STEP

# Of a float32 probe against the same LSTM in plain torch, in another order of sums.
TOLERANCE = 1e-4
# Batch, steps, scale of the inputs, and whether every step has the same: the last counts c up to
# the number of steps, so that a bound on it shows.
RUNS = ((3, 1, 1.0, False), (1, 130, 1.0, False), (2, 5, 30.0, False), (2, 130, 30.0, True))


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
    """

    weights: tuple[str, ...]
    order: str = "ifgo"
    time_first: bool = False
    parameters: tuple[str, ...] = ()
    form: Any = None
    stateful: tuple[bool, ...] = ()
    modules: tuple[type, ...] = ()


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


def run_plain(plan: Plan, weights: list[Tensor], x: Tensor, state: Any) -> Steps:
    weight_ih, weight_hh, *biases = weights
    x_BTE = x.transpose(0, 1) if plan.time_first else x
    zeros = x_BTE.new_zeros(len(x_BTE), weight_hh.shape[1])
    h, c = (zeros, zeros) if state is None else state
    outputs = []
    for x_BE in x_BTE.unbind(1):
        raw = F.linear(x_BE, weight_ih) + F.linear(h, weight_hh) + sum(biases)
        i, f, g, o = (raw.chunk(4, -1)[plan.order.index(gate)] for gate in "ifgo")
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return Steps(torch.stack(outputs, 1), h, c)


def fill(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(form, str):
        return tensors[form]
    return type(form)(fill(part, tensors) for part in form)


@torch.inference_mode(False)
@torch.autocast("cpu", enabled=False)
def recognise(layer: nn.Module) -> Plan | str | None:
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
        draw = torch.Generator().manual_seed(0)
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
        yield Plan(tuple(found), parameters=_parameters(layer), modules=_within(layer))
    elif len(holders) == 2 and all(type(module) is nn.Linear for _, module in holders):
        for (path, input_linear), (hidden_path, linear) in itertools.permutations(holders):
            rows = 4 * linear.in_features
            if linear.out_features == input_linear.out_features == rows:
                given = (path, input_linear), (hidden_path, linear)
                biases = tuple(p + "bias" for p, module in given if module.bias is not None)
                found = [path + "weight", hidden_path + "weight"]
                names = (*found, *biases)
                yield Plan(names, parameters=_parameters(layer), modules=_within(layer))


def _parameters(layer: nn.Module) -> tuple[str, ...]:
    """Names of the first two of forward, after self."""
    return tuple(inspect.signature(type(layer).forward).parameters)[1:3]


def _within(layer: nn.Module) -> tuple[type, ...]:
    return tuple(type(module) for module in layer.modules())[1:]


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_as_recognised(layer: Any, plan: Plan) -> bool:
    """Whether the modules within compute what they did then: another may stand in the place of a
    Linear (an adapter, a quantised one), a hook may give it its weight (weight_norm, pruning)."""
    within = list(layer.modules())[1:]
    return tuple(map(type, within)) == plan.modules and not any(map(has_hooks, within))


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
        for training, state in itertools.product((True, False), plan.stateful):
            self.layer.train(training)
            for B, T, scale, steady in RUNS:
                if not self._agrees(plan, B, T, scale, state, steady):
                    mode = "training" if training else "evaluation"
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
                    named = run_plain(plan, weights, x, state).named(time_first)
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
            want = run_plain(plan, gather(self.layer, plan), x.unsqueeze(1), (h, c))
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

    def _agrees(
        self, plan: Plan, B: int, T: int, scale: float, with_state: bool, steady: bool
    ) -> bool:
        """Outputs and gradients: a layer may detach its state."""
        x, state = self._inputs(plan, B, T, scale, with_state)
        if steady:
            time = 0 if plan.time_first else 1
            x = x.narrow(time, 0, 1).expand_as(x).detach().requires_grad_()
        got = self._call(x, state)
        weights = gather(self.layer, plan)
        want = fill(plan.form, run_plain(plan, weights, x, state).named(plan.time_first))
        got, want = _leaves(got), _leaves(want)
        if got is None or len(got) != len(want) or not all(map(_near, got, want)):
            return False
        leaves = [x, *(state or ()), *weights]
        gradients = [_gradients(outputs, leaves) for outputs in (got, want)]
        return all(map(_near, *gradients))


def _gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum(((k + 1) * t.sin().sum() for k, t in enumerate(outputs)), torch.zeros(()))
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return list(found)


def _same_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return before.keys() == after.keys() and all(after[name] is before[name] for name in before)


def _near(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape:
        return False
    error, size = (got - want).norm(), want.norm()
    return bool(error <= TOLERANCE * size + 1e-7)


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
