"""The linear losses on a GPU: its products, and that a graph can hold a call."""

from __future__ import annotations

import pytest
import torch
from linear_cases import FUNCTIONS, HEAD, Case, call, check_case, inputs

from xlstm_kernels import gemm
from xlstm_kernels.backends import TRITON_INTERPRETED, UNAVAILABLE, Backend, cuda_refuses

ON_GPU = torch.device("cuda")
WHY_NOT = {
    "cuda": UNAVAILABLE[Backend.CUDA] or cuda_refuses("hidden", ON_GPU),
    "triton": UNAVAILABLE[Backend.TRITON] or ("interpreted" if TRITON_INTERPRETED else None),
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name}: {why}"))
        for name, why in WHY_NOT.items()
    ],
)


@KERNELS
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("E", [16, 256])  # sums of the weight's gradient, and all rows at once
def test_on_a_device(kernels, function, dtype, E):
    case = Case(kernels, function, dtype, N=40, E=E, V=32000, ce_weight=0.3, weighted=True)
    check_case(case, "cuda")
    check_case(Case(kernels, function, dtype, N=40, E=E, V=5001, bias=True, chunk_rows=32), "cuda")


def test_products_of_bfloat16_are_not_rounded():
    a, b = (torch.randn(300, 300, device="cuda").bfloat16() for _ in range(2))
    assert gemm.product_dtype(torch.bfloat16, a.device) == torch.bfloat16
    out, exact = torch.empty(300, 300, device="cuda"), a.double() @ b.double()
    gemm.multiply(out, a, b.mT.contiguous().mT, False)
    for factor in (1, 2):
        assert (out - factor * exact).norm() < 1e-6 * exact.norm()
        gemm.multiply(out, a, b, True)


@KERNELS
@pytest.mark.parametrize("function", FUNCTIONS)
def test_captured_in_a_graph(kernels, function):
    case = Case(kernels, function, torch.bfloat16, N=30, E=64, V=5000, ce_weight=0.3, chunk_rows=32)
    t = {name: tensor.cuda() for name, tensor in inputs(case).items()}
    leaves = [t[name].requires_grad_() for name in HEAD[:2]]

    def step():
        loss = call(case, t, kernels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    want, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        got = step()
    for part in got:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
