"""What the tests of `xk.mlstm_step` share: inputs, a call by a case's flags, the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mlstm_cases import (
    DEVICES,
    FLOAT64,
    INPUTS,
    ON_CPU,
    SLOW,
    STATE,
    WIDENED,
    MLSTMCase,
    mlstm_inputs,
    on_every_backend,
)

import xlstm_kernels as xk
from xlstm_kernels.cells import mlstm as cell
from xlstm_kernels.ops.mlstm_step import op
from xlstm_kernels.testing import check

BACKENDS = [backend.value for backend in op.MLSTM_STEP.table]


def marks(backend: str) -> list[pytest.MarkDecorator]:
    """Of a test whose tensors are on the CPU."""
    return [pytest.mark.slow, ON_CPU] if backend == "triton" else []


# In Triton's interpreter a call takes long; what tests/test_mlstm_step_triton.py has is fast.
EACH_BACKEND = [pytest.param(b, marks=marks(b)) for b in BACKENDS]
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", *EACH_BACKEND])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


SMALL = (3, 2, 24, 130)  # B, H, K, V
# Columns of a head in several tasks; a state that is streamed.
LARGE = ((1, 1, 130, 1003), (4, 4, 512, 520))


def with_dtypes(
    *backends: Any, shapes: Any = (SMALL,), dtypes: Any = DTYPES
) -> pytest.MarkDecorator:
    """Each backend with each dtype that it has, and each shape it is fast enough for."""
    calls = [
        pytest.param(backend, dtype, shape, marks=marks(backend))
        for backend in backends
        for dtype in dtypes
        for shape in (shapes[:1] if backend in SLOW else shapes)
        if dtype != torch.float64 or backend in (*FLOAT64, "reference")
    ]
    return pytest.mark.parametrize(("backend", "dtype", "shape"), calls)


Tokens = list[torch.Tensor]


def every(*variants: dict) -> list:
    return on_every_backend(*({"T": 1, **v} for v in variants), backends=BACKENDS)


def step_inputs(case: MLSTMCase, one: bool = True) -> tuple[Tokens, xk.MLSTMState]:
    """The tokens, without their axis where there is `one`, and the state before them."""
    inputs = mlstm_inputs(case)
    tokens = [inputs[name].squeeze(1) if one else inputs[name] for name in INPUTS]
    return tokens, xk.MLSTMState(*(inputs[f"{field}0"] for field in STATE))


def halved(state: xk.MLSTMState) -> xk.MLSTMState:
    return state._replace(c=state.c.bfloat16())


def call(case: MLSTMCase, tokens: Tokens, state: Any, **how: Any) -> dict[str, torch.Tensor]:
    flags = {"input_gate": case.input_gate, "normalizer": case.normalizer, "scale": case.scale}
    device = DEVICES.get(case.backend, "cpu")
    tokens, state = [x.to(device) for x in tokens], tuple(x.to(device) for x in state)
    h, last = xk.mlstm_step(*tokens, state, **flags, **{"backend": case.backend, **how})
    return {name: x.cpu() for name, x in {"h": h, **last._asdict()}.items()}


def exact_steps(case: MLSTMCase, tokens: Tokens, state: Any) -> list[dict[str, torch.Tensor]]:
    """h and the state after each of the tokens (B, T, ...), in float64."""
    last, results = xk.MLSTMState(*(x.double() for x in state)), []
    for token in zip(*(x.double().unbind(1) for x in tokens), strict=True):
        h, last = cell.step(*token, last, case.options)
        results.append({"h": h, **last._asdict()})
    return results


def check_step(case: MLSTMCase, half: bool = False, all_states: bool = False, **how: Any) -> None:
    """Raises AssertionError unless the call is within its budget; c in bfloat16 where `half`."""
    tokens, state = step_inputs(case, one=False)
    state = halved(state) if half else state
    steps = exact_steps(case, tokens, state)
    exact = {name: torch.stack([step[name] for step in steps], dim=1) for name in steps[0]}
    if not all_states:
        exact = {name: x if name == "h" else x[:, -1] for name, x in exact.items()}
    if case.T == 1 and not all_states:
        tokens = [x.squeeze(1) for x in tokens]
        exact["h"] = exact["h"].squeeze(1)
    plain = call(replace(case, backend="reference"), tokens, state, all_states=all_states)
    for name, got in call(case, tokens, state, all_states=all_states, **how).items():
        check(name, got, exact[name], plain[name], WIDENED[case.normalizer])
