"""xk.slstm and xk.lstm as citizens of torch: operators, compilation, autocast, threads, errors."""

import re

import pytest
import torch
from recurrence_cases import BACKENDS, EACH_BACKEND, on_every_backend
from torch._dynamo.testing import CompileCounterWithBackend

import xlstm_kernels as xk
from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.recurrence import op
from xlstm_kernels.testing import RecurrenceCase, call_recurrence, recurrence_inputs

FUNCTIONS = {"slstm": xk.slstm, "lstm": xk.lstm}
EVERY_BACKEND = pytest.mark.parametrize("backend", EACH_BACKEND)
EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


def operator_arguments(case: RecurrenceCase) -> tuple:
    """(x, r, b, state, cu_seqlens) of the operators."""
    inputs = recurrence_inputs(case)
    fields = CELLS[case.cell].State._fields
    state = torch.stack([inputs[f"{f}0"] for f in fields]) if "h0" in inputs else None
    starts = None
    if case.lengths is not None:
        ends = torch.tensor([0, *case.lengths]).cumsum(0)
        starts = ends.to(torch.int32)
    return inputs["x"], inputs["r"], inputs.get("b"), state, starts


OPERATOR_CASES = on_every_backend(
    {"T": 18, "D": 5},
    {"T": 1, "D": 5, "state": "zero", "bias": False},
    {"lengths": (3, 0, 20), "D": 5, "dtype": torch.bfloat16},
)


@pytest.mark.medium
@pytest.mark.parametrize("case", OPERATOR_CASES)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward(case, save):
    torch.library.opcheck(
        op.forward, (*operator_arguments(case), case.cell, 0.0, save, case.backend)
    )


@pytest.mark.medium
@pytest.mark.parametrize("case", OPERATOR_CASES)
@pytest.mark.parametrize("want", [[True, True, True], [False, False, False]])
def test_opcheck_backward(case, want):
    x, r, b, state, starts = operator_arguments(case)
    h, last, raw, checkpoints = op.forward(
        *(x, r, b, state, starts, case.cell, 0.0, True, case.backend)
    )
    call = (h, last, r, raw, checkpoints, starts, case.cell, 0.0, None, x.new_empty(0), want)
    torch.library.opcheck(op.backward, (*call, case.backend))


@pytest.mark.medium
@EVERY_BACKEND
@EVERY_FUNCTION
@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiles_once_for_all_lengths(name, backend, graph):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(graph)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=counter, dynamic=True)
    r = torch.randn(4, 2, 5, 5, requires_grad=True)
    compilations = []
    for T in (3, 7, 20, 33):
        x = torch.randn(2, T, 4, 2, 5, requires_grad=True)
        results = []
        for function in (compiled, FUNCTIONS[name]):
            h, last = function(x, r, backend=backend)
            grads = torch.autograd.grad(h.sum() + last[-1].square().sum(), (x, r))
            results.append((h, *last, *grads))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        compilations.append(counter.frame_count)
    # One call may compile twice, while dynamo finds out what is constant.
    assert compilations[0] == compilations[-1] <= 2


@pytest.mark.slow
@EVERY_BACKEND
@EVERY_FUNCTION
def test_compiles_with_inductor(name, backend):
    torch.compiler.reset()

    def loss(x, r):
        h, last = FUNCTIONS[name](x.sin(), r, backend=backend)
        return (h.tanh().sum() + last[-1].sum()).exp().log()

    x, r = torch.randn(2, 9, 4, 2, 5), torch.randn(4, 2, 5, 5)
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = x.clone().requires_grad_(), r.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@EVERY_BACKEND
@EVERY_CELL
def test_without_gradient(cell, backend):
    case = RecurrenceCase(cell, backend)
    inputs = recurrence_inputs(case)
    h, last = call_recurrence(case, inputs, backend)
    inputs["x"].requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got, got_last = call_recurrence(case, inputs, backend)
            assert torch.equal(got, h) and torch.equal(got_last[-1], last[-1])
            assert not got.requires_grad and not got_last.h.requires_grad


@pytest.mark.parametrize("backend", ["reference", *EACH_BACKEND])
@EVERY_CELL
def test_autocast_leaves_the_recurrence_alone(cell, backend):
    case = RecurrenceCase(cell, backend)
    inputs = recurrence_inputs(case)
    h, last = call_recurrence(case, inputs, backend)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_last = call_recurrence(case, inputs, backend)
    assert torch.equal(got, h) and torch.equal(got_last[-1], last[-1])


@EVERY_BACKEND
@EVERY_FUNCTION
def test_auto_takes_the_first_backend_that_can(name, backend, monkeypatch):
    x, r = torch.randn(1, 3, 4, 1, 2), torch.randn(4, 1, 2, 2)
    called, forward = [], op.forward

    def record(*call):
        called.append(call[-1])
        return forward(*call)

    monkeypatch.setattr(op, "forward", record)
    FUNCTIONS[name](x, r)
    assert called == [BACKENDS[0]]


X = torch.zeros(2, 3, 4, 2, 5)
R = torch.zeros(4, 2, 5, 5)
PART = torch.zeros(2, 2, 5)
STARTS = torch.tensor([0, 3], dtype=torch.int32)
# Arguments, error, and the message after the function's name. S stands for a full state.
ERRORS = [
    (lambda S: ((X[0], R), {}), ValueError, "x must be (B, T, 4, H, D), got (3, 4, 2, 5)"),
    (
        lambda S: ((X[:, :, :3], R), {}),
        ValueError,
        "x must be (B, T, 4, H, D), got (2, 3, 3, 2, 5)",
    ),
    (
        lambda S: ((X[..., :0], R), {}),
        ValueError,
        "x must have H and D of at least 1, got (2, 3, 4, 2, 0)",
    ),
    (
        lambda S: ((X.int(), R), {}),
        TypeError,
        "x must be a floating point tensor, got torch.int32",
    ),
    (
        lambda S: ((X, R[..., :3]), {}),
        ValueError,
        "r must be (4, H, D, D) = (4, 2, 5, 5), got (4, 2, 5, 3)",
    ),
    (
        lambda S: ((X, R.long()), {}),
        TypeError,
        "r must be a floating point tensor, got torch.int64",
    ),
    (lambda S: ((X, R.to("meta")), {}), ValueError, "r must be on x's device cpu, got meta"),
    (
        lambda S: ((X, R, PART), {}),
        ValueError,
        "b must be (4, H, D) = (4, 2, 5), got (2, 2, 5)",
    ),
    (
        lambda S: ((X, R), {"state": S(PART[:1])}),
        ValueError,
        "state.h must be (B, H, D) = (2, 2, 5), got (1, 2, 5)",
    ),
    (
        lambda S: ((X, R), {"state": (*S(PART)[:-1], PART.int())}),
        TypeError,
        re.compile(r"state\.[cm] must be a floating point tensor, got torch.int32"),
    ),
    (
        lambda S: ((X, R), {"state": S(PART)[:1]}),
        ValueError,
        re.compile(r"state must be \(h, c(, n, m)?\), got 1 tensors"),
    ),
    (
        lambda S: ((X, R), {"cu_seqlens": STARTS}),
        ValueError,
        "x must have B = 1 with cu_seqlens, got B = 2",
    ),
    (
        lambda S: ((X[:1], R), {"cu_seqlens": STARTS.long()}),
        ValueError,
        "cu_seqlens must be (S + 1,) int32, got (2,) torch.int64",
    ),
    (
        lambda S: ((X[:1], R), {"cu_seqlens": STARTS[None]}),
        ValueError,
        "cu_seqlens must be (S + 1,) int32, got (1, 2) torch.int32",
    ),
    (
        lambda S: ((X[:1], R), {"cu_seqlens": STARTS.to("meta")}),
        ValueError,
        "cu_seqlens must be on x's device cpu, got meta",
    ),
    (
        lambda S: ((X, R), {"backend": "gpu"}),
        ValueError,
        "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'",
    ),
]


def message(error) -> str:
    return error.pattern if isinstance(error, re.Pattern) else re.escape(error)


@EVERY_FUNCTION
@pytest.mark.parametrize(("arguments", "kind", "text"), ERRORS, ids=lambda v: "")
def test_errors_name_argument_expected_and_got(name, arguments, kind, text):
    states = {"slstm": 4, "lstm": 2}[name]
    positional, keywords = arguments(lambda part: (part,) * states)
    with pytest.raises(kind, match=message(text)) as caught:
        FUNCTIONS[name](*positional, **keywords)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"forget_gate": "tanh"}, "forget_gate must be 'sigmoid' or 'exp', got 'tanh'"),
        ({"n_floor": -1.0}, "n_floor must be a finite number >= 0, got -1.0"),
        ({"n_floor": float("nan")}, "n_floor must be a finite number >= 0, got nan"),
        ({"clip_grad": 0.0}, "clip_grad must be a number > 0, got 0.0"),
        ({"clip_grad": float("nan")}, "clip_grad must be a number > 0, got nan"),
    ],
)
def test_errors_of_slstm_options(options, text):
    with pytest.raises(ValueError, match=f"^slstm: {re.escape(text)}$"):
        xk.slstm(X, R, **options)


@pytest.mark.parametrize("backend", ["reference", *EACH_BACKEND])
@EVERY_FUNCTION
@pytest.mark.parametrize("starts", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4, 3], [0, -1, 3], [0]])
def test_wrong_offsets_are_refused_before_they_index(name, backend, starts):
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    text = f"{name}: cu_seqlens must rise from 0 to T = 3, got {starts}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        FUNCTIONS[name](X[:1], R, cu_seqlens=cu_seqlens, backend=backend)


@EVERY_BACKEND
@EVERY_FUNCTION
def test_named_backend_runs_or_raises(name, backend):
    x = torch.zeros(1, 3, 4, 1, 2, dtype=torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=f"{name}: backend '{backend}' cannot run this"):
        FUNCTIONS[name](x, torch.zeros(4, 1, 2, 2), backend=backend)
