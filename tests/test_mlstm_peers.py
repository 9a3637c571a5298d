"""The mLSTM is the one of Hugging Face transformers: values, states, and what autograd through its
plain torch functions gives. Layouts apart (they have heads before time, and m of (B, H, 1)) the
conventions are the same, eps and the stabiliser of a zero state included."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import chain

import pytest
import torch
from mlstm_cases import (
    FLOAT64,
    INPUTS,
    STATE,
    WIDENED,
    MLSTMCase,
    mlstm_inputs,
    plain_runs,
    run_mlstm,
)
from torch import Tensor

import xlstm_kernels as xk
from xlstm_kernels.testing import Results, check_results, relative_error, run

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; the extra `test` has it"
)
theirs = import_module("transformers.models.xlstm.modeling_xlstm")
if theirs.external_xlstm:
    pytest.skip(
        "transformers has no mLSTM of its own where the package xlstm is installed",
        allow_module_level=True,
    )

CHUNK_SIZE = 16
STATES = ("zero", "random")


def call_theirs(form: str, inputs: Results) -> tuple[Tensor, xk.MLSTMState]:
    q, k, v, i, f = (inputs[name].transpose(1, 2).contiguous() for name in INPUTS)
    dtype = i.dtype
    start = {}
    if "c0" in inputs:
        start = {f"{field}_initial": inputs[f"{field}0"] for field in STATE}
        start["m_initial"] = start["m_initial"][..., None]
    if form == "chunkwise":
        function, options = theirs.mlstm_chunkwise_native_autograd, {"chunk_size": CHUNK_SIZE}
    else:
        function, options = theirs.mlstm_recurrent_sequence_native, {"dtype_state": dtype}
    h, (c, n, m) = function(q, k, v, i, f, **start, return_last_states=True, **options)
    return h.transpose(1, 2), xk.MLSTMState(c, n, m.squeeze(-1))


def run_theirs(form: str, inputs: Results) -> dict[str, Tensor]:
    return run(lambda leaves: call_theirs(form, leaves), inputs)


def in_double(inputs: Results) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("form", ["chunkwise", "recurrent"])
@pytest.mark.parametrize("backend", ["reference", *FLOAT64])
def test_same_function_and_gradients(backend, form, state):
    case = MLSTMCase(backend, T=4 * CHUNK_SIZE, state=state)
    inputs = mlstm_inputs(case)
    exact = run_theirs(form, in_double(inputs))
    got = run_mlstm(replace(case, dtype=torch.float64), in_double(inputs), backend)
    for name in exact:
        assert relative_error(got[name], exact[name]) < 1e-11, name
    # In float32, with the budget that their own error earns, or all orders of the sums together.
    got = run_mlstm(case, inputs, backend)
    check_results(
        got,
        exact,
        chain([run_theirs(form, inputs)], plain_runs(case, inputs)),
        WIDENED[case.normalizer],
    )


@pytest.mark.parametrize("backend", ["reference", *FLOAT64])
def test_same_step(backend):
    inputs = in_double(mlstm_inputs(MLSTMCase(backend, T=1)))
    token, state = [inputs[name][:, 0] for name in INPUTS], [inputs[f"{s}0"] for s in STATE]
    h, last = xk.mlstm_step(*token, tuple(state), backend=backend)
    q, k, v, i, f = token
    want, (c, n, m) = theirs.mlstm_recurrent_step_native(
        *(q, k, v, i[..., None], f[..., None]),
        *(state[0], state[1], state[2][..., None]),
        dtype_state=torch.float64,
    )
    for got, exact in zip((h, *last), (want, c, n, m.squeeze(-1)), strict=True):
        assert relative_error(got, exact) < 1e-13


@pytest.mark.parametrize("num_heads", [1, 2])
def test_same_block(num_heads):
    """The block of xLSTM-7B, with their weights in ours."""
    torch.manual_seed(0)
    config = transformers.xLSTMConfig(
        hidden_size=128,
        num_heads=num_heads,
        num_hidden_layers=1,
        chunk_size=CHUNK_SIZE,
        mode="train",
        norm_reduction_force_float32=False,
    )
    block = theirs.xLSTMBlock(config).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    theirs_of = dict(block.named_parameters())
    layer = "mlstm_layer"
    gates = [f"{layer}.{gate}_preact" for gate in ("igate", "fgate")]
    parts = {
        "mlstm.qkvo.weight": [f"{layer}.{name}.weight" for name in ("q", "k", "v", "ogate_preact")],
        "mlstm.gates.weight": [f"{gate}.weight" for gate in gates],
        "mlstm.gates.bias": [f"{gate}.bias" for gate in gates],
        "mlstm.norm.weight": [f"{layer}.multihead_norm.weight"],
        "mlstm.out.weight": [f"{layer}.out_proj.weight"],
        "norm_mlstm.weight": ["norm_mlstm.weight"],
        "norm_ffn.weight": ["norm_ffn.weight"],
        "gate_up.weight": ["ffn.proj_up_gate.weight", "ffn.proj_up.weight"],
        "down.weight": ["ffn.proj_down.weight"],
    }
    ours = xk.nn.XLSTMBlock(128, num_heads, dtype=torch.float64)
    ours.load_state_dict(
        {name: torch.cat([theirs_of.pop(part) for part in found]) for name, found in parts.items()}
    )
    assert not theirs_of, "parameters of theirs that ours lacks"
    x = torch.randn(2, 3 * CHUNK_SIZE, 128, dtype=torch.float64)
    (want, _), (got, _) = block(x), ours(x)
    assert relative_error(got, want) < 1e-12
