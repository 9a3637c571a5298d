"""xk.linear_kl_div and its kin as citizens of torch: autograd, operators, compilation, autocast,
views, errors."""

from __future__ import annotations

import re

import pytest
import torch
from kl_div_cases import DTYPES
from linear_cases import BACKENDS, EVERYWHERE, FUNCTIONS, HEAD, Case, call, inputs, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div.options import Options
from xlstm_kernels.ops.linear_kl_div import op
from xlstm_kernels.ops.linear_kl_div.inputs import Inputs
from xlstm_kernels.testing import relative_error

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERYWHERE_TOO = pytest.mark.parametrize("backend", EVERYWHERE)
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean"])


def tracked(case: Case, *wanted: str) -> dict[str, torch.Tensor]:
    """The case's inputs; those wanted, or all of HEAD, require a gradient."""
    tensors = inputs(case)
    for name in wanted or HEAD:
        if name in tensors:
            tensors[name].requires_grad_()
    return tensors


@EVERY_BACKEND
@EVERY_FUNCTION
@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backward_gives_the_same(backend, function, reduction, dtype):
    """A gradient that forward computed is scaled once."""
    case = Case(backend, function, dtype, reduction=reduction, bias=True, ce_weight=0.4)
    t = tracked(case)
    leaves = [t[name] for name in HEAD]
    loss = call(case, t, backend)
    dloss = 3 * t["dloss"].to(loss.dtype)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, dloss, retain_graph=True)]
    again, once_more, twice = (
        torch.autograd.grad(loss, leaves, factor * dloss, retain_graph=True) for factor in (1, 1, 2)
    )
    for a, b, c, d in zip(first, again, once_more, twice, strict=True):
        assert torch.equal(b, c)
        for got, want in ((b, a), (d, 2 * a)):
            assert relative_error(got, want) <= 16 * torch.finfo(dtype).eps


@EVERYWHERE_TOO
@EVERY_FUNCTION
def test_rows_that_do_not_count_leave_no_trace(backend, function):
    case = Case(backend, function, bias=True, ce_weight=0.4, weighted=True)
    t = inputs(case)
    want = run(case, t, backend)
    t["hidden"][:, 0] = t["hidden"][0, -1] = float("nan")  # of an ignored label, of weight 0
    for name, got in run(case, t, backend).items():
        assert_close(got, want[name])


@EVERY_BACKEND
@pytest.mark.parametrize("wanted", [HEAD[:1], HEAD[1:2], HEAD[2:], HEAD[::2]], ids=str)
@REDUCTIONS
def test_some_gradients(backend, wanted, reduction):
    case = Case(backend, bias=True, reduction=reduction)
    every = run(case, inputs(case), backend)
    t = tracked(case, *wanted)
    loss = call(case, t, backend)
    loss.backward(t["dloss"].to(loss.dtype))
    for name in HEAD:
        if name in wanted:
            assert_close(t[name].grad, every[f"d{name}"])
        else:
            assert t[name].grad is None


@EVERY_BACKEND
def test_gradients_accumulate_over_two_losses(backend):
    case = Case(backend)
    t, want = tracked(case), tracked(case)
    for tensors, name in ((t, backend), (want, "reference")):
        for scale in (1.0, 2.0):
            call(case, {**tensors, "hidden": scale * tensors["hidden"]}, name).backward()
    for name in ("hidden", "weight"):
        assert_close(t[name].grad, want[name].grad)


@EVERY_BACKEND
@pytest.mark.parametrize("compiled", [False, True])
def test_float16_gradients_survive_a_loss_scale(backend, compiled):
    """Unscaled they are below float16's least number."""
    torch.compiler.reset()
    case = Case(backend, dtype=torch.float16, N=32, V=5000)
    t, scale = tracked(case, "hidden", "weight"), 2.0**16

    def loss(t):
        tensors = {**t, "row_weight": torch.full((2, 32), 1e-4, dtype=t["hidden"].dtype)}
        return call(case, tensors, backend)

    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    leaves = "hidden", "weight"
    grads = torch.autograd.grad(function(t) * scale, [t[name] for name in leaves])
    exact = {name: part.detach().double() for name, part in t.items()}
    for name in leaves:
        exact[name].requires_grad_()
    want = torch.autograd.grad(loss(exact) * scale, [exact[name] for name in leaves])
    for a, b in zip(grads, want, strict=True):
        assert (a.double() - b).norm() < 2e-3 * b.norm()


@EVERY_BACKEND
@EVERY_FUNCTION
def test_second_derivative_is_an_error_that_says_what_to_do(backend, function):
    case = Case(backend, function)
    t = tracked(case)
    (grad,) = torch.autograd.grad(call(case, t, backend), t["hidden"], create_graph=True)
    text = f"{function}: backend '{backend}' has no second derivative; use backend='reference'"
    with pytest.raises(NotImplementedError, match=text):
        grad.sum().backward()


@EVERY_BACKEND
@EVERY_FUNCTION
def test_without_gradient(backend, function):
    case = Case(backend, function)
    t = tracked(case)
    want = call(case, t, backend)
    assert want.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = call(case, t, backend)
            assert_close(got, want.detach())
            assert not got.requires_grad


@EVERYWHERE_TOO
def test_storage_of_the_weight_does_not_matter(backend):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(backend, dtype=dtype)
        t = inputs(case)
        want = run(case, t, backend)
        transposed = {**t, "weight": t["weight"].mT.contiguous().mT}
        wide = torch.full((600, 40), torch.nan, dtype=dtype)
        wide[::2, ::2] = t["weight"]
        for strided in (transposed, {**t, "weight": wide[::2, ::2]}):
            for name, got in run(case, strided, backend).items():
                assert_close(got, want[name])


@EVERY_BACKEND
@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_autocast_is_that_of_a_linear_layer(backend, function, dtype):
    """Products in bfloat16, gradients in the dtype of the parameters; float64 is left alone."""
    case = Case(backend, function, dtype, bias=True)
    t = inputs(case)
    double = dtype == torch.float64
    low = t if double else {k: v.bfloat16() if "hidden" in k else v for k, v in t.items()}
    want = run(case, low, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(case, t, backend)
    for name in got:
        assert got[name].dtype == (want if name != "dhidden" else {name: t["hidden"]})[name].dtype
        assert_close(got[name], want[name], check_dtype=False)


def operator_calls(backend):
    for function, reduction, dtype in (
        ("linear_kl_div", "mean", torch.float32),
        ("linear_kl_div", "none", torch.bfloat16),
        ("linear_topk_kl_div", "mean", torch.bfloat16),
        ("linear_cross_entropy", "mean", torch.float64),
    ):
        case = Case(backend, function, dtype, bias=reduction == "none", ce_weight=0.5)
        t = inputs(case)
        options = Options(reduction=reduction, ce_weight=0.5)
        if function == "linear_cross_entropy":
            options = options._replace(kl_weight=0.0, ce_weight=1.0)
        yield *Inputs(*(t.get(name) for name in Inputs._fields)), *options, case.support


@pytest.mark.medium
@EVERY_BACKEND
@pytest.mark.parametrize(
    "wanted", [[False] * 3, [True, True, False], [False, False, True]], ids=str
)
def test_opcheck(backend, wanted):
    for arguments in operator_calls(backend):
        has_bias = arguments[2] is not None
        want = [*wanted[:2], wanted[2] and has_bias]
        torch.library.opcheck(op.forward, (*arguments, 4, want, backend))


@pytest.mark.medium
@EVERY_BACKEND
@EVERY_FUNCTION
@REDUCTIONS
def test_compiles_once_for_every_number_of_rows(backend, function, reduction):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compilations = []
    case = Case(backend, function, reduction=reduction, bias=True, ce_weight=0.3, weighted=True)
    compiled = torch.compile(lambda t: call(case, t, backend), fullgraph=True, backend=counter)
    for N in (4, 7, 20, 33):
        t = tracked(Case(**{**case.__dict__, "N": N}))
        for name in set(t) & {*Inputs._fields} - {*HEAD[1:], "teacher_weight", "teacher_bias"}:
            torch._dynamo.mark_dynamic(t[name], 1)
        got, want = compiled(t), call(case, t, backend)
        assert_close(got, want)
        leaves = [t[name] for name in HEAD]
        dloss = t["dloss"].to(want.dtype)
        for a, b in zip(*(torch.autograd.grad(x, leaves, dloss) for x in (got, want)), strict=True):
            assert_close(a, b)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] <= 2


@pytest.mark.slow
@EVERY_BACKEND
@REDUCTIONS
def test_compiles_with_inductor(backend, reduction):
    torch.compiler.reset()
    case = Case(backend, reduction=reduction)
    t = tracked(case)

    def loss(t):
        return call(case, {**t, "hidden": t["hidden"].sin()}, backend).exp().sum()

    leaves = [t["hidden"], t["weight"]]
    want, got = (
        torch.autograd.grad(function(t), leaves)
        for function in (loss, torch.compile(loss, fullgraph=True))
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_auto_takes_the_kernel():
    case = Case()
    assert "LinearLoss" in type(call(case, tracked(case), "auto").grad_fn).__name__


X, W = torch.randn(4, 9), torch.randn(20, 9)
T, U = torch.randn(4, 5), torch.randn(22, 5)
L = torch.zeros(4, dtype=torch.int64)
LEADING = "must have student_hidden's leading shape (4,), got"
PARAMETER = torch.randn(22, 5, requires_grad=True)
WRONG = [
    (ValueError, (X, W, torch.randn(5, 5), U), {}, f"teacher_hidden {LEADING} (5,)"),
    (ValueError, (X, W, T, U, L[:3]), {}, f"labels {LEADING} (3,)"),
    (ValueError, (X, W, T, U), {"row_weight": torch.ones(5)}, f"row_weight {LEADING} (5,)"),
    (ValueError, (X, W[:, :8], T, U), {}, "student_weight must be (V, E) = (20, 9), got (20, 8)"),
    (ValueError, (X, W, T, U.mT), {}, "teacher_weight must be (V, E) = (5, 5), got (5, 22)"),
    (ValueError, (X, W[0], T, U), {}, "student_weight must be (V, E) = (V, 9), V >= 1, got (9,)"),
    (ValueError, (torch.tensor(1.0), W, T, U), {}, "student_hidden must be (..., E), E >= 1, got"),
    (ValueError, (X, W, T, U), {"student_bias": torch.ones(19)},
     "student_bias must be (V,) = (20,), got (19,)"),
    (ValueError, (X, W, T, U), {"teacher_bias": torch.ones(20)},
     "teacher_bias must be (V,) = (22,), got (20,)"),
    (ValueError, (X, W, T, PARAMETER), {}, "pass teacher_weight.detach()"),
    (ValueError, (X, W, T * PARAMETER[0], U), {}, "pass teacher_hidden.detach()"),
    (ValueError, (X, W, T, U), {"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
    (TypeError, (X, W, T, U), {"chunk_rows": 2.0}, "chunk_rows must be an integer, got float"),
    (TypeError, (X, W, T, U), {"chunk_rows": True}, "chunk_rows must be an integer, got bool"),
    (ValueError, (X, W, T, U), {"ce_weight": 0.5}, "labels are needed for ce_weight = 0.5, got"),
    (TypeError, (X, W, T, U, X[:, 0]), {}, "labels must be integers, got torch.float32"),
    (TypeError, (L[:, None], W, T, U), {}, "student_hidden must be a floating point tensor, got"),
    (TypeError, (X, W, T, None), {}, "teacher_weight must be a tensor, got NoneType"),
    (ValueError, (X, W, T.to("meta"), U), {}, "teacher_hidden must be on student_hidden's device"),
    (ValueError, (X, W, T, U), {"temperature": 0.0}, "temperature must be"),
    (ValueError, (X, W, T, U), {"divergence": "kl"}, "divergence must be one of"),
    (ValueError, (X, W, T, U), {"backend": "gpu"}, "backend must be one of"),
    (NotImplementedError, [x.to("meta") for x in (X, W, T, U)], {"backend": "cpu"},
     "it runs on CPU tensors, hidden is on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "args", "how", "text"), WRONG, ids=[w[3][:50] for w in WRONG])
def test_errors(kind, args, how, text):
    with pytest.raises(kind, match="linear_kl_div: .*" + re.escape(text)):
        xk.linear_kl_div(*args, **how)


def test_errors_name_the_function_that_was_called():
    for args, text in (
        ((X, W[:, 1:], L), "weight must be (V, E) = (20, 9), got (20, 8)"),
        ((X, W, None), "labels are needed for ce_weight = 1.0, got None"),
        ((X, W, L[:2]), "labels must have hidden's leading shape (4,), got (2,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"linear_cross_entropy: {text}")):
            xk.linear_cross_entropy(*args)
