"""The mLSTM is the one of Hugging Face transformers: values, states, and what autograd through its
plain torch functions gives. Layouts apart (they have heads before time, and m of (B, H, 1)) the
conventions are the same, eps and the stabiliser of a zero state included."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from mlstm_cases import BACKENDS, INPUTS, STATE, WIDENED, MLSTMCase, mlstm_inputs, run_mlstm
from torch import Tensor

import xlstm_kernels as xk
from xlstm_kernels.testing import Results, check_results, relative_error, run

pytest.importorskip("transformers", reason="transformers is not installed; the extra `test` has it")
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
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_same_function_and_gradients(backend, form, state):
    case = MLSTMCase(backend, T=4 * CHUNK_SIZE, state=state)
    inputs = mlstm_inputs(case)
    exact = run_theirs(form, in_double(inputs))
    got = run_mlstm(replace(case, dtype=torch.float64), in_double(inputs), backend)
    for name in exact:
        assert relative_error(got[name], exact[name]) < 1e-11, name
    # In float32, with the budget that their own error earns.
    got = run_mlstm(case, inputs, backend)
    check_results(got, exact, iter([run_theirs(form, inputs)]), WIDENED[case.normalizer])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
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
