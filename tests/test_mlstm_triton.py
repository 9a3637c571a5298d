"""The mLSTM's Triton kernels in small: every branch of them, fast enough to run while one works."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mlstm_cases import (
    FLAGS,
    INPUTS,
    ON_CPU,
    MLSTMCase,
    call_mlstm,
    check_mlstm,
    exact_mlstm,
    mlstm_inputs,
    run_mlstm,
)

import xlstm_kernels as xk
from xlstm_kernels.backends import UNAVAILABLE, Backend
from xlstm_kernels.ops.mlstm import op, triton_launch
from xlstm_kernels.testing import check_results

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
# One head, two tiles of tokens.
SMALL = {"B": 1, "T": 70, "H": 1, "K": 16, "V": 24}
CASES = [
    *({**SMALL, **flags} for flags in FLAGS),
    {**SMALL, "T": 1, "state": "zero"},
    {**SMALL, "dtype": torch.bfloat16, "layout": "head_first"},
    {**SMALL, "dtype": torch.float16, "T": 20},
    {**SMALL, "gates": 50.0, "T": 40, "state": "zero"},
    {**SMALL, "lengths": (0, 3, 66, 0), "state": "large"},
]
INTERVALS = {**SMALL, "T": 520}  # two, side by side


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of keys and of values, as wide heads have."""
    choose = triton_launch.choose

    def chosen(*args: object) -> triton_launch.Launch:
        launch = choose(*args)
        kernels = ("states", "outputs", "queries", "dstates", "keys", "scan")
        return replace(launch, **{k: replace(getattr(launch, k), k=16, v=16) for k in kernels})

    monkeypatch.setattr(triton_launch, "choose", chosen)


@pytest.mark.parametrize("case", [MLSTMCase("triton", **variant) for variant in CASES], ids=str)
def test_small_cases(case):
    check_mlstm(case)


@pytest.mark.medium
def test_intervals():
    check_mlstm(MLSTMCase("triton", **INTERVALS))


@pytest.mark.medium
@pytest.mark.parametrize(
    "variant", [{}, pytest.param({"lengths": (9, 0, 11)}, marks=pytest.mark.slow)], ids=str
)
def test_several_blocks_of_keys_and_values(variant, monkeypatch):
    small_blocks(monkeypatch)
    check_mlstm(MLSTMCase("triton", **{**SMALL, "T": 20, "K": 40, "V": 40, **variant}))


@pytest.mark.slow
def test_walks_are_the_intervals_side_by_side(monkeypatch):
    monkeypatch.setattr(triton_launch, "BUSY_PROGRAMS", 0)
    case = MLSTMCase("triton", **INTERVALS)
    check_mlstm(case)


@ON_CPU
@pytest.mark.parametrize("forward", ["cpu", "triton"])
def test_backward_of_another_backends_forward(forward):
    """What forward saves belongs to the operation."""
    case = MLSTMCase("triton", **SMALL)
    inputs = mlstm_inputs(case)
    tensors = [inputs[name] for name in (*INPUTS, "c0", "n0", "m0")]
    call = (None, *case.options, 0)
    h, c, n, m, *saved = op.forward(*tensors, *call, True, forward)
    weights = [inputs[f"weight_{name}"] for name in ("h", "last_c", "last_n", "last_m")]
    backward = {"cpu": "triton", "triton": "cpu"}[forward]
    grads = op.backward(*weights, *tensors[:5], saved, *call, True, backward)
    got = dict(zip(("h", "last_c", "last_n", "last_m"), (h, c, n, m), strict=True))
    got |= {f"d_{name}": d for name, d in zip((*INPUTS, "c0", "n0", "m0"), grads, strict=True)}
    check_results(got, exact_mlstm(case, inputs), iter([run_mlstm(case, inputs, "reference")]))


def test_a_split_with_carried_state_changes_nothing():
    case = MLSTMCase("triton", **SMALL)
    inputs = mlstm_inputs(case)
    first = {name: x[:, :41] if name in INPUTS else x for name, x in inputs.items()}
    h_first, state = call_mlstm(case, first, "triton")
    second = {name: inputs[name][:, 41:] for name in INPUTS}
    second |= {f"{field}0": part for field, part in state._asdict().items()}
    h_second, last = call_mlstm(case, second, "triton")
    got = {"h": torch.cat([h_first, h_second], dim=1)}
    got |= {f"last_{field}": part for field, part in last._asdict().items()}
    exact = {name: x for name, x in exact_mlstm(case, inputs).items() if name in got}
    check_results(got, exact, iter([run_mlstm(case, inputs, "reference")]))


@ON_CPU
def test_float64_is_refused():
    x, gate = torch.zeros(1, 2, 1, 4, dtype=torch.float64), torch.zeros(1, 2, 1)
    why = "^mlstm: backend 'triton' cannot run this call: q must be float32, bfloat16 or float16,"
    with pytest.raises(NotImplementedError, match=why):
        xk.mlstm(x, x, x, gate, gate, backend="triton")
