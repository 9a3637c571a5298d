"""Losses under torch.compile whose numbers change from call to call."""

from __future__ import annotations

import pytest
import torch
from kl_div_cases import BACKENDS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div import op
from xlstm_kernels.ops.kl_div.options import NUMBERS, Options, with_numbers, without_numbers
from xlstm_kernels.ops.topk_kl_div import op as topk_op

N, V, E, K = 3, 20, 4, 5
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
SCHEDULES = Options._fields[NUMBERS]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS, TEACHER = torch.tensor([3, 0, 19]), normal(N, V, seed=1)
LOGPROBS, IDS = normal(N, V, seed=2).log_softmax(-1).topk(K)
WEIGHT, HEAD = normal(V, E, seed=3), (normal(N, E, seed=4), normal(V, E, seed=5))
LOSSES = {
    "kl_div": lambda x, **how: xk.kl_div(x, TEACHER, LABELS, **how),
    "topk_kl_div": lambda x, **how: xk.topk_kl_div(x, LOGPROBS, IDS, LABELS, **how),
    "linear_kl_div": lambda x, **how: xk.linear_kl_div(x[:, :E], WEIGHT, *HEAD, LABELS, **how),
    "linear_cross_entropy": lambda x, **how: xk.linear_cross_entropy(
        x[:, :E], WEIGHT, LABELS, **how
    ),
}


def check_schedule(call, x, schedule, graph="aot_eager", most=3):
    """`call(x, value)`, compiled, is what it is eagerly, gradient too, and is compiled `most` times
    at most: for the first value, for any, and for one that stands for something else."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(graph)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for value in schedule:
        got, want = compiled(x, value), call(x, value)
        assert_close(got, want)
        grads = [torch.autograd.grad(loss, x)[0] for loss in (got, want)]
        assert_close(*grads)
    assert counter.frame_count <= most


@pytest.mark.medium
@EVERY_BACKEND
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_number_that_changes(backend, name):
    how = {"ce_weight": 0.5, "divergence": "js", "backend": backend}

    def call(x, value):
        return LOSSES["kl_div"](x, **how | {name: value})

    check_schedule(call, normal(N, V).requires_grad_(), [0.2 + 0.06 * i for i in range(12)])


@pytest.mark.medium
@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_loss(function, dtype):
    def call(x, value):
        if function == "linear_cross_entropy":
            return LOSSES[function](x, z_loss=value, label_smoothing=value / 2, softcap=5 + value)
        return LOSSES[function](x, temperature=1 + value, ce_weight=value, kl_weight=1 - value)

    x = normal(N, V).to(dtype).requires_grad_()
    check_schedule(call, x, [0.08 * i for i in range(12)])


@pytest.mark.medium
def test_without_gradient():
    def call(x, value):
        return LOSSES["kl_div"](x.detach(), temperature=value) + x.sum()

    check_schedule(call, normal(N, V).requires_grad_(), range(1, 13))


@pytest.mark.slow
def test_with_inductor():
    def call(x, value):
        return LOSSES["kl_div"](x.sin(), temperature=1 + value, ce_weight=value)

    schedule = [0.1 + 0.08 * i for i in range(12)]
    check_schedule(call, normal(N, V).requires_grad_(), schedule, "inductor")


@pytest.mark.medium
def test_a_number_that_stays_is_no_tensor():
    """CUDA graphs take no graph with a CPU tensor in it."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    call = torch.compile(LOSSES["kl_div"], backend=look, fullgraph=True)
    call(normal(N, V), temperature=2.5, ce_weight=0.5)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("kl_div_forward" in name for name in targets)
    assert not any("by" in name or "ones" in name for name in targets)


@pytest.mark.parametrize(("op", "more"), [(op, ()), (topk_op, ("tail",))], ids=["kl_div", "topk"])
@pytest.mark.parametrize("want_grad", [False, True])
def test_opcheck(op, more, want_grad):
    options = Options("js", temperature=2.0, ce_weight=0.3, softcap=20.0)
    numbers = torch.tensor([number or 0.0 for number in options[NUMBERS]], dtype=torch.float64)
    assert with_numbers(without_numbers(options), numbers) == options
    target = (LOGPROBS, IDS, None) if more else (TEACHER,)
    call = *target, LABELS, None, *without_numbers(options), *more, want_grad, "cpu"
    torch.library.opcheck(op.forward_by, (normal(N, V), numbers, *call))
    want = op.forward(normal(N, V), *target, LABELS, None, *options, *more, want_grad, "cpu")
    assert_close(op.forward_by(normal(N, V), numbers, *call), want)
