"""The CUDA kernels of the losses over logits: how they cut a row, labels that are none, and on a
device streams and graphs. The operation's other tests run them on the emulator too."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from kl_div_cases import Case, call, check_case, inputs

import xlstm_kernels as xk
from xlstm_kernels.backends import CUDA_EMULATOR, load_cuda
from xlstm_kernels.ops.kl_div import op
from xlstm_kernels.ops.kl_div.options import DIVERGENCES, Options
from xlstm_kernels.testing import check

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("xlstm_kernels._cuda") is None,
        reason="xlstm_kernels._cuda is not built",
    ),
]
H100, A100 = (90, 227 << 10), (80, 163 << 10)
# Chips whose shared memory is so small that a short row is cut as a long one is elsewhere.
SMALL = {"clusters": (90, 12 << 10), "no clusters": (80, 12 << 10)}


@pytest.fixture
def set_chip() -> Iterator:
    if CUDA_EMULATOR is None:
        pytest.skip("the emulator is built by `make emulated`")
    chip = load_cuda(emulated=True).set_chip
    yield chip
    chip(*H100)


WIDTHS = [300, 1200, 1500, 2500, 3001, 9000, 14000]


@pytest.mark.parametrize("chip", SMALL)
@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.float32, None),
        *(
            pytest.param(*dtypes, marks=pytest.mark.slow)
            for dtypes in ((torch.bfloat16, None), (torch.bfloat16, torch.float32))
        ),
    ],
    ids=str,
)
def test_every_cut_of_a_row(set_chip, chip, V, dtype, teacher_dtype):
    set_chip(*SMALL[chip])
    for divergence in DIVERGENCES:
        check_case(
            Case("cuda", divergence, V, N=3, dtype=dtype, teacher_dtype=teacher_dtype,
                 ce_weight=0.3, temperature=2.0, softcap=20.0)
        )  # fmt: skip


@pytest.mark.parametrize("chip", SMALL)
@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize(("support", "divergence"), [("tail", "js"), ("renormalized", "forward")])
def test_every_cut_of_a_row_beside_words(set_chip, chip, V, support, divergence):
    set_chip(*SMALL[chip])
    student, teacher = (
        torch.randn(3, V, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    logprobs, ids = teacher.log_softmax(-1).topk(20)
    got, plain, exact = (
        words_gradient(student.to(dtype), logprobs.to(dtype), ids, support, divergence, backend)
        for dtype, backend in (
            (torch.float32, "cuda"),
            (torch.float32, "reference"),
            (torch.float64, "reference"),
        )
    )
    check(f"{support} {divergence} V{V}", got, exact, plain)


def words_gradient(student, logprobs, ids, support, divergence, backend):
    student.requires_grad_()
    loss = xk.topk_kl_div(
        student, logprobs, ids, ids[:, 3], ce_weight=0.3, temperature=2.0,
        support=support, divergence=divergence, backend=backend,
    )  # fmt: skip
    return torch.autograd.grad(loss, student)[0]


def test_cuts_are_all_there():
    """One to eight blocks, all numbers of threads, kept as a whole and in part: of these widths on
    these chips as of long rows on others."""
    if CUDA_EMULATOR is None:
        pytest.skip("the emulator is built by `make emulated`")
    row_shape = load_cuda(emulated=True).row_shape

    def cuts(chips, widths):
        return {
            (cut["blocks"], cut["kept"] == cut["slice"])
            for capability, shared_bytes in chips
            for V in widths
            for per_vector in (4, 8)
            if (cut := row_shape(shared_bytes, capability >= 90, V, per_vector, 2))
        }

    tested = cuts(SMALL.values(), WIDTHS)
    assert tested == cuts((H100, A100), (1, 32000, 50304, 128256, 256000))
    assert len(tested) == 6


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("label", [-1, 9, 2**40])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_a_label_out_of_range_makes_its_row_nan(backend, label, ce_weight):
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    labels = torch.tensor([0, 1, label, -100])
    how = {"ce_weight": ce_weight, "reduction": "none", "backend": backend}
    loss = xk.kl_div(student, teacher, labels, **how)
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    assert loss.isnan().tolist() == [False, False, True, False]
    assert grad.isnan().all(-1).tolist() == [False, False, True, False]
    assert grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("divergence", [pytest.param(name, marks=gpu) for name in DIVERGENCES])
@pytest.mark.parametrize("V", [1000, 32000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_device(divergence, V, dtype):
    case = Case("cuda", divergence, V, dtype=dtype, ce_weight=0.3, temperature=2.0)
    tensors = inputs(case)
    exact = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    got = call(case, {name: tensor.cuda() for name, tensor in tensors.items()}, "cuda")
    for name, *three in zip(
        ("loss", "dstudent"),
        (part.cpu() for part in got),
        call(case, exact, "reference"),
        call(case, tensors, "reference"),
        strict=True,
    ):
        check(f"{case} {name}", *three)


@pytest.mark.parametrize("reduction", [pytest.param(name, marks=gpu) for name in ("none", "mean")])
def test_captured_in_a_graph_on_its_own_stream(reduction):
    student, teacher = torch.randn(5, 40000).cuda(), torch.randn(5, 40000).cuda()
    call = (teacher, torch.arange(5).cuda(), None, *Options(ce_weight=0.3, reduction=reduction))
    want = op.forward(student, *call, True, "cuda")
    logits = torch.zeros_like(student)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        got = op.forward(logits, *call, True, "cuda")
    logits.copy_(student)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
