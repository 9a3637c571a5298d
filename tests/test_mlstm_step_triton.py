"""The step's Triton kernel in small: every branch of it, fast enough to run while one works."""

from __future__ import annotations

import pytest
import torch
from mlstm_cases import FLAGS, MLSTMCase
from mlstm_step_cases import check_step, step_inputs

import xlstm_kernels as xk
from xlstm_kernels.backends import UNAVAILABLE, Backend
from xlstm_kernels.ops.mlstm_step import triton as backend

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
# One head, two blocks of columns.
SMALL = {"B": 1, "H": 1, "K": 12, "V": 40, "T": 2}
TOKENS = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    monkeypatch.setattr(backend, "choose", lambda K, V: backend.Blocks(16, 32, 1))


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
def test_gates_and_normalizers(flags):
    check_step(MLSTMCase("triton", **SMALL, **flags))


@pytest.mark.parametrize("all_states", [False, True])
@pytest.mark.parametrize("dtype", TOKENS)
def test_dtypes_and_rounded_states(dtype, all_states):
    check_step(MLSTMCase("triton", **SMALL, dtype=dtype), half=True, all_states=all_states)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_rows_of_a_pool_in_place(save, half):
    """As in test_mlstm_step_pool.py: one row is padding, one state is not kept."""
    case = MLSTMCase("triton", **{**SMALL, "B": 2})
    tokens, state = step_inputs(case, one=False)
    pools = [xk.MLSTMState(*(torch.full((4, *x.shape[1:]), 7.0) for x in state)) for _ in range(2)]
    for pool in pools:
        for part, x in zip(pool, state, strict=True):
            part[2] = x[0]
    if half:
        pools = [pool._replace(c=pool.c.bfloat16()) for pool in pools]
    saved = torch.tensor([[1, 2], [0, 3]], dtype=torch.int32) if save else None
    index = torch.tensor([2, -1])
    h = [
        xk.mlstm_step(*tokens, p, inplace=True, state_index=index, save_index=saved, backend=b)[0]
        for b, p in zip(("triton", "reference"), pools, strict=True)
    ]
    torch.testing.assert_close(*h)
    for got, expected in zip(*pools, strict=True):
        torch.testing.assert_close(got, expected)
        assert (got[[0, 3]] == 7).all() and (got[1] == 7).all() != save


def test_float64_and_wide_keys_are_refused():
    state = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1)
    x, gate = torch.zeros(1, 1, 4, dtype=torch.float64), torch.zeros(1, 1)
    why = "^mlstm_step: backend 'triton' cannot run this call: q must be float32, bfloat16 or"
    with pytest.raises(NotImplementedError, match=why):
        xk.mlstm_step(x, x, x, gate, gate, state, backend="triton")
    assert backend.supports(torch.zeros(1, 1, 513)) == "K must be at most 512, got 513"
