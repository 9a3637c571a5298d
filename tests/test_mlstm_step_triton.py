"""The step's Triton kernel in small: every branch of it, fast enough to run while one works."""

from __future__ import annotations

import pytest
import torch
from mlstm_cases import FLAGS, ON_CPU, MLSTMCase
from mlstm_step_cases import check_step, step_inputs

import xlstm_kernels as xk
from xlstm_kernels.backends import UNAVAILABLE, Backend
from xlstm_kernels.ops.mlstm_step import triton as backend
from xlstm_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
# One head, two blocks of columns.
SMALL = {"B": 1, "H": 1, "K": 12, "V": 40, "T": 2}
TOKENS = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda K, V: choose(K, V)._replace(v=32))


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
def test_gates_and_normalizers(flags):
    check_step(MLSTMCase("triton", **SMALL, **flags))


@pytest.mark.parametrize("all_states", [False, True])
@pytest.mark.parametrize("dtype", TOKENS)
def test_dtypes_and_rounded_states(dtype, all_states):
    check_step(MLSTMCase("triton", **SMALL, dtype=dtype), half=True, all_states=all_states)


@ON_CPU
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_a_graph_on_a_gpu_decodes_as_the_cpu_does(half):
    """Captured once, replayed with other tokens and rows: nothing is allocated or waited for."""
    case = MLSTMCase("triton", B=3, H=2, K=96, V=80, T=4)
    tokens, state = step_inputs(case, one=False)
    zeros = (torch.zeros(6, *x.shape[1:]) for x in state)
    pool = xk.MLSTMState(*zeros)
    pool = pool._replace(c=pool.c.bfloat16()) if half else pool
    index = torch.tensor([4, -1, 0])
    given = [x.cuda() for x in (*tokens, index, torch.empty_like(tokens[2]), *pool)]

    def step():
        how = {"inplace": True, "state_index": given[5], "out": given[6], "backend": "triton"}
        xk.mlstm_step(*given[:5], tuple(given[7:]), **how)

    step()  # compiles
    for part in given[7:]:
        part.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for rows in ((4, -1, 0), (0, 4, 5)):
        given[5].copy_(torch.tensor(rows))
        graph.replay()
        how = {"inplace": True, "state_index": torch.tensor(rows), "backend": "reference"}
        h, _ = xk.mlstm_step(*tokens, pool, **how)
        for got, expected in zip(given[6:], (h, *pool), strict=True):
            assert relative_error(got.cpu(), expected) < (1e-2 if half else 1e-5)
        tokens = [x.flip(0) for x in tokens]
        for x, new in zip(given, tokens, strict=False):
            x.copy_(new)


@ON_CPU
def test_float64_and_wide_keys_are_refused():
    state = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1)
    x, gate = torch.zeros(1, 1, 4, dtype=torch.float64), torch.zeros(1, 1)
    why = "^mlstm_step: backend 'triton' cannot run this call: q must be float32, bfloat16 or"
    with pytest.raises(NotImplementedError, match=why):
        xk.mlstm_step(x, x, x, gate, gate, state, backend="triton")
    assert backend.supports(torch.zeros(1, 1, 513)) == "K must be at most 512, got 513"
