"""xk.kl_div as a citizen of torch: autograd, operators, compilation, views, threads, errors."""

from __future__ import annotations

import re

import pytest
import torch
from kl_div_cases import BACKENDS, EVERYWHERE
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div import cpu, op
from xlstm_kernels.ops.kl_div.options import DIVERGENCES, Options

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERYWHERE_TOO = pytest.mark.parametrize("backend", EVERYWHERE)
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


def pair(*shape, dtype=torch.float32):
    """A student that requires a gradient and a teacher."""
    return normal(*shape, dtype=dtype).requires_grad_(), normal(*shape, dtype=dtype, seed=1)


ROWS = (torch.tensor([3, -100, 0, 8]), torch.tensor([0.5, 1.0, 2.0, 0.0]))


@EVERY_BACKEND
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_backward_gives_the_same(backend, reduction, dtype):
    student, teacher = pair(5, 300, dtype=dtype)
    loss = xk.kl_div(student, teacher, reduction=reduction, backend=backend)
    dloss = 2 * torch.ones_like(loss)
    first = torch.autograd.grad(loss, student, dloss, retain_graph=True)[0].clone()
    for _ in range(2):
        again = torch.autograd.grad(loss, student, dloss, retain_graph=True)[0]
        assert torch.equal(again, first)
    # The reference on the same logits.
    loss = xk.kl_div(student, teacher, reduction=reduction, backend="reference")
    assert_close(first, torch.autograd.grad(loss, student, dloss)[0])


@EVERY_BACKEND
def test_gradients_accumulate_over_two_losses(backend):
    student, teacher = pair(5, 30)
    hidden = student * 1.5
    loss = sum(xk.kl_div(hidden, teacher, temperature=T, backend=backend) for T in (1.0, 2.0))
    (grad,) = torch.autograd.grad(loss, student)
    hidden = student * 1.5
    loss = sum(xk.kl_div(hidden, teacher, temperature=T, backend="reference") for T in (1.0, 2.0))
    assert_close(grad, torch.autograd.grad(loss, student)[0])


@EVERY_BACKEND
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_float16_gradients_survive_a_loss_scale(backend, weight_dtype, compiled):
    """Unscaled they are below float16's least number."""
    torch.compiler.reset()
    student, teacher = pair(64, 5000, dtype=torch.float16)
    scale, weight = 2.0**16, torch.full((64,), 1e-4, dtype=weight_dtype)

    def loss(student, teacher, weight):
        return xk.kl_div(student, teacher, row_weight=weight, backend=backend)

    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    (grad,) = torch.autograd.grad(run(student, teacher, weight) * scale, student)
    exact = student.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(loss(exact, teacher.double(), weight.double()) * scale, exact)
    assert (grad.double() - want).norm() < 2e-3 * want.norm()


@EVERY_BACKEND
@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivative_is_an_error_that_says_what_to_do(backend, inplace):
    student, teacher = pair(3, 9)
    loss = xk.kl_div(1 * student, teacher, inplace_grad=inplace, backend=backend)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    # Another path to the leaf, which alone would give a number.
    with pytest.raises(NotImplementedError, match=r"no second derivative; use backend='reference'"):
        torch.autograd.grad(grad.sum() + student.sum(), student)


@EVERY_BACKEND
def test_without_gradient(backend):
    student, teacher = pair(3, 2100)
    want = xk.kl_div(student, teacher, backend=backend)
    assert want.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = xk.kl_div(student, teacher, backend=backend, inplace_grad=True)
            assert torch.equal(got, want) and not got.requires_grad
    assert torch.equal(student, normal(3, 2100))


@EVERY_BACKEND
@EVERY_DIVERGENCE
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inplace_gradient_is_the_same(backend, divergence, reduction, dtype):
    leaf, teacher = pair(2, 3, 2100, dtype=dtype)
    how = {"divergence": divergence, "reduction": reduction, "temperature": 2.0, "ce_weight": 0.3}
    labels = torch.tensor([[0, 2099, -100], [7, 8, 9]])
    results = []
    for inplace in (False, True):
        student = leaf * 1
        addresses = []
        student.register_hook(lambda grad, found=addresses: found.append(grad.data_ptr()))
        loss = xk.kl_div(student, teacher, labels, inplace_grad=inplace, backend=backend, **how)
        leaf.grad = None
        loss.backward(torch.full_like(loss, 3))
        results.append((loss, leaf.grad))
        assert (addresses == [student.data_ptr()]) == inplace
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@EVERY_BACKEND
def test_inplace_gradient_of_views(backend):
    leaf, teacher = pair(4, 6, 50)
    grads = []
    for view in (lambda x: x[:, :-1], lambda x: x[::2, 1:], lambda x: x.mT[:, ::3]):
        for inplace in (False, True):
            student = view(leaf * 1)
            other = view(teacher)
            loss = xk.kl_div(student, other, inplace_grad=inplace, backend=backend)
            grads.append(torch.autograd.grad(loss * 2, leaf)[0])
        assert torch.equal(*grads[-2:])


class Logits(torch.autograd.Function):
    """A view made inside a Function, which autograd lets nobody modify."""

    @staticmethod
    def forward(ctx, x):
        return (x * 2).view(-1, x.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        return (grad * 2).view(2, 2, -1)


@EVERY_BACKEND
def test_inplace_gradient_of_a_function_that_returns_a_view(backend):
    leaf, teacher = pair(2, 2, 50)
    student = Logits.apply(leaf)
    loss = xk.kl_div(student, teacher.view(4, 50), inplace_grad=True, backend=backend)
    (got,) = torch.autograd.grad(loss, leaf)
    loss = xk.kl_div(leaf * 2, teacher, backend=backend)
    assert torch.equal(got, torch.autograd.grad(loss, leaf)[0])


@EVERY_BACKEND
def test_inplace_runs_backward_once(backend):
    leaf, teacher = pair(4, 50)
    loss = xk.kl_div(leaf * 1, teacher, inplace_grad=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_grad=True backward runs once"):
        loss.backward()


@EVERY_BACKEND
def test_inplace_is_loud_when_the_logits_are_used_otherwise(backend):
    leaf, teacher = pair(4, 50)
    student = leaf.exp()  # saves its result for backward
    loss = xk.kl_div(student, teacher, inplace_grad=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    student = leaf * 1
    loss = xk.kl_div(student, teacher, inplace_grad=True, backend=backend)
    with torch.no_grad():
        student.zero_()
    with pytest.raises(RuntimeError, match="student_logits hold the gradient until backward"):
        loss.backward()


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s, t: (s, t), "got a leaf that requires a gradient"),
        (lambda s, t: (s[:, 1:], t[:, 1:]), "got a leaf that requires a gradient"),
        (lambda s, t: ((s * 1)[:1].expand(4, 9), t), "elements do not share memory"),
        (lambda s, t: ((x := s * 1)[:2], x.detach()[2:]), "not share memory with"),
    ],
)
def test_inplace_refuses(backend, spoil, text):
    student, teacher = spoil(*pair(4, 9))
    with pytest.raises(ValueError, match=f"kl_div: inplace_grad=True .*{text}"):
        xk.kl_div(student, teacher, inplace_grad=True, backend=backend)


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "shifted, two leading axes": lambda x: x.view(2, 2, 5, -1)[:, :, 1:],
    "every other row": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "columns": lambda x: x[..., 3:90],
    "transposed rows": lambda x: x.transpose(0, 1),
    "one row": lambda x: x[1, 2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_read_in_place(view, monkeypatch):
    student, teacher = (view(normal(4, 5, 120, seed=seed)) for seed in (0, 1))
    assert view is VIEWS["one row"] or not student.is_contiguous()
    want = xk.kl_div(student.contiguous(), teacher.contiguous(), reduction="none", backend="cpu")
    launches = []

    class Spy:
        def kl_div(self, *args):
            launches.append(args)
            extension.kl_div(*args)

    extension = cpu.load_cpu()
    monkeypatch.setattr(cpu, "load_cpu", Spy)
    got = xk.kl_div(student, teacher, reduction="none", backend="cpu")
    assert torch.equal(got, want)
    (args,) = launches
    assert (args[3], args[13]) == (student.data_ptr(), teacher.data_ptr())


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_logit_size_but_the_gradient(backend, dtype):
    student, teacher = pair(3, 40, 3000, dtype=dtype)
    hidden = student * 1
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = xk.kl_div(hidden[:, :-1], teacher[:, :-1], temperature=2.0, backend=backend)
        grad = torch.autograd.grad(2 * loss, hidden)[0]
    grown = [e.cpu_memory_usage for e in profile.events() if e.name == "aten::empty"]
    bytes_of_rows = 3 * 39 * 3000 * dtype.itemsize
    large = [size for size in grown if size >= bytes_of_rows // 8]
    # The gradient of the rows; that of the view's base is zeros it is copied into.
    assert len(large) <= 2 and large[0] == bytes_of_rows, large
    assert grad.shape == hidden.shape


def operator_calls():
    labels, weight = ROWS
    plain = Options(temperature=2.0)
    mixed = Options(
        "js", temperature=2.0, ce_weight=0.3, softcap=20.0, label_smoothing=0.1, reduction="none"
    )
    return [
        (normal(4, 9), normal(4, 9, seed=1), None, None, *plain),
        (normal(4, 9, dtype=torch.bfloat16), normal(4, 12, seed=1), labels, weight, *mixed),
        (normal(2, 3, 9)[:, :2], normal(2, 2, 9, seed=1), None, None, *plain),
    ]


@pytest.mark.medium
@EVERY_BACKEND
@pytest.mark.parametrize("call", operator_calls())
@pytest.mark.parametrize("want_grad", [False, True])
def test_opcheck(backend, call, want_grad):
    torch.library.opcheck(op.forward, (*call, want_grad, backend))
    torch.library.opcheck(op.overwrite, (call[0].clone(), *call[1:], backend))
    for factor in (torch.tensor(2.0), torch.rand(call[0].shape[:-1])):
        torch.library.opcheck(op.scale, (call[0], factor, backend))


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 15, 64, 1000])
def test_scale(backend, dtype, V):
    factor = torch.tensor([1.0, 0.0, -2.5, float("nan")])
    for view in (lambda x: x, lambda x: x[:, 1:]):
        grad = view(normal(4, 3, V, dtype=dtype))
        per_row = factor.unsqueeze(-1).expand(grad.shape[:-1])
        want = (grad.double() * per_row.double().unsqueeze(-1)).to(dtype)
        op.scale(grad, per_row, backend)
        assert_close(grad, want, equal_nan=True)


@pytest.mark.medium
@EVERYWHERE_TOO
@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiles_once_for_every_number_of_rows(backend, graph):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(graph)

    def loss(student, teacher, labels, weight):
        return xk.kl_div(
            student, teacher, labels, ce_weight=0.3, temperature=2.0, row_weight=weight,
            backend=backend, inplace_grad=True,
        )  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    compilations = []
    for N in (4, 7, 20, 33):
        student, teacher = pair(N, 50)
        labels, weight = torch.arange(N), torch.rand(N)
        for rows in (student, teacher, labels, weight):
            torch._dynamo.mark_dynamic(rows, 0)
        got = compiled(student, teacher, labels, weight)
        grad = torch.autograd.grad(3 * got, student)[0]
        hidden = student * 1
        want = loss(hidden, teacher, labels, weight)
        assert_close(got, want)
        assert_close(grad, torch.autograd.grad(3 * want, student)[0])
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] <= 2


@pytest.mark.slow
@EVERY_BACKEND
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_with_inductor(backend, reduction):
    torch.compiler.reset()

    def loss(student, teacher):
        return xk.kl_div(student.sin(), teacher, reduction=reduction, backend=backend).exp().sum()

    student, teacher = pair(5, 40)
    want, got = (
        torch.autograd.grad(function(student, teacher), student)[0]
        for function in (loss, torch.compile(loss, fullgraph=True))
    )
    assert_close(got, want)


@EVERYWHERE_TOO
def test_autocast_leaves_the_loss_alone(backend):
    student, teacher = pair(4, 60, dtype=torch.float64)
    want = xk.kl_div(student, teacher, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = xk.kl_div(student, teacher, backend=backend)
        half = xk.kl_div(student.bfloat16(), teacher, backend=backend)
    assert torch.equal(got, want) and got.dtype == torch.float64 and half.dtype == torch.float32


@EVERY_BACKEND
@EVERY_DIVERGENCE
def test_threads_do_not_change_a_bit(backend, divergence, threads):
    student, teacher = pair(70, 4099)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        loss = xk.kl_div(student, teacher, divergence=divergence, backend=backend)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_auto_takes_the_kernel():
    student, teacher = pair(4, 9)
    assert "RowLoss" in type(xk.kl_div(student, teacher).grad_fn).__name__


S, T = normal(4, 9), normal(4, 9)
META, LABELS = (S.to("meta"), T.to("meta")), torch.zeros(4, dtype=torch.int64)
LEADING = "must have student_logits' leading shape (4,), got"
TEMPERATURE = "temperature must be in [1e-06, 1e+06], got"
CAP = "must be finite and > 0, or None, got"
WRONG = [
    (ValueError, (S, normal(5, 9)), {}, f"teacher_logits {LEADING} (5,)"),
    (ValueError, (S, T, LABELS[:3]), {}, f"labels {LEADING} (3,)"),
    (ValueError, (S, T), {"row_weight": torch.ones(4, 1)}, f"row_weight {LEADING} (4, 1)"),
    (ValueError, (normal(4, 0), T), {}, "student_logits must be (..., V), V >= 1, got (4, 0)"),
    (ValueError, (torch.tensor(1.0), T), {}, "student_logits must be (..., V), V >= 1, got ()"),
    (TypeError, (LABELS, T), {}, "student_logits must be floating point, got torch.int64"),
    (TypeError, (S, T, S[:, 0]), {}, "labels must be integers, got torch.float32"),
    (TypeError, (S, T), {"row_weight": LABELS}, "row_weight must be floating point, got torch.int"),
    (ValueError, (S, T), {"ce_weight": 0.5}, "labels are needed for ce_weight = 0.5, got None"),
    (ValueError, pair(4, 9)[::-1], {}, "teacher_logits must not require a gradient"),
    (ValueError, (S, T), {"row_weight": pair(4)[0]}, "pass row_weight.detach()"),
    (ValueError, (S, T.to("meta")), {}, "must be on student_logits' device cpu, got meta"),
    (ValueError, (S, T), {"temperature": 0.0}, f"{TEMPERATURE} 0.0"),
    (ValueError, (S, T), {"temperature": 1e-40}, f"{TEMPERATURE} 1e-40"),
    (ValueError, (S, T), {"temperature": 1e300}, f"{TEMPERATURE} 1e+300"),
    (ValueError, (S, T), {"temperature": float("nan")}, f"{TEMPERATURE} nan"),
    (ValueError, (S, T), {"temperature": float("inf")}, f"{TEMPERATURE} inf"),
    (ValueError, (S, T), {"beta": 1.5}, "beta must be 0 or in [1e-20, 1], got 1.5"),
    (ValueError, (S, T), {"beta": 1e-30}, "beta must be 0 or in [1e-20, 1], got 1e-30"),
    (ValueError, (S, T), {"label_smoothing": 2}, "label_smoothing must be in [0, 1], got 2"),
    (ValueError, (S, T), {"softcap": 0.0}, f"softcap {CAP} 0.0"),
    (ValueError, (S, T), {"teacher_softcap": -1.0}, f"teacher_softcap {CAP} -1.0"),
    (ValueError, (S, T), {"divergence": "kl"}, "'skew', 'skew_reverse', 'tv', got 'kl'"),
    (ValueError, (S, T), {"reduction": "avg"}, "'sum', 'mean', 'batchmean', got 'avg'"),
    (ValueError, (S, T), {"backend": "gpu"}, "backend must be one of"),
    (NotImplementedError, META, {"backend": "cuda"}, "backend 'cuda' cannot run this call"),
    (NotImplementedError, META, {"backend": "cpu"}, "runs on CPU tensors"),
]


@pytest.mark.parametrize(("kind", "args", "how", "text"), WRONG, ids=[w[3][:50] for w in WRONG])
def test_errors(kind, args, how, text):
    with pytest.raises(kind, match="kl_div: .*" + re.escape(text)):
        xk.kl_div(*args, **how)
