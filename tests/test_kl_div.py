"""xk.kl_div on every backend: values and gradients against the float64 oracle, and every corner."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kl_div_cases import BACKENDS, DTYPES, EVERYWHERE, Case, check_case, inputs
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div import op
from xlstm_kernels.ops.kl_div.options import DIVERGENCES, Options

INF = float("inf")
MIXTURES = ["js", "skew", "skew_reverse"]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERYWHERE_TOO = pytest.mark.parametrize("backend", EVERYWHERE)
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def cases(**axes) -> list:
    """pytest parameters: the product of the axes for each backend and divergence."""
    axes = {"backend": BACKENDS, "divergence": DIVERGENCES, **axes}
    found = [
        Case(**dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values())
    ]
    return [pytest.param(case, id=str(case)) for case in found]


def gradient(student, teacher, *args, **how):
    """The loss and its gradient by the student."""
    student = student.detach().requires_grad_()
    loss = xk.kl_div(student, teacher, *args, **how)
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    return loss.detach(), grad


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


ACCURACY = [
    *cases(V=[1, 2, 15, 64, 257, 2048, 2049, 5000], dtype=DTYPES),
    *cases(V=[257], dtype=DTYPES, temperature=[0.1, 4.0], ce_weight=[0.0, 0.3]),
    # Not float64: KL is 5e-5 here, and the oracle has no digits to spare.
    *cases(V=[257], dtype=DTYPES[1:], temperature=[100.0], ce_weight=[0.0, 0.3]),
    *cases(V=[257], dtype=DTYPES, teacher_dtype=DTYPES),
    *cases(V=[130], reduction=["none", "sum", "mean", "batchmean"], weighted=[False, True],
           ce_weight=[0.0, 0.3], temperature=[1.0, 2.0]),
    *cases(V=[3000], dtype=[torch.float32], offset=[0.0, 20.0, 1e3], apart=[1e-3, 1e-1, 30.0]),
    *cases(V=[4100], dtype=DTYPES, ce_weight=[0.5], temperature=[1.0, 2.0]),
    *cases(V=[3000], dtype=DTYPES, divergence=MIXTURES, beta=[0.1, 0.9]),
    # Not float64: the oracle cancels where teacher and student are far apart.
    *cases(V=[3000], dtype=DTYPES[1:], divergence=MIXTURES, beta=[0.1, 0.9], apart=[30.0]),
    *cases(V=[2100], dtype=DTYPES, divergence=["forward", "js"], ce_weight=[0.3],
           temperature=[1.0, 2.0], label_smoothing=[0.0, 0.2], z_loss=[0.0, 1e-2],
           softcap=[None, 7.0]),
    *cases(V=[500], dtype=DTYPES, divergence=["reverse", "skew"], softcap=[30.0],
           teacher_softcap=[10.0]),
]  # fmt: skip


@pytest.mark.parametrize("case", ACCURACY)
def test_against_the_oracle(case):
    check_case(case)


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("ce_weight", "temperature"), [(0.0, 1.5), (0.4, 1.0), (0.4, 1.5)])
def test_gradcheck(backend, divergence, reduction, ce_weight, temperature):
    student = normal(2, 3, 7, dtype=torch.float64).requires_grad_()
    teacher = normal(2, 3, 7, dtype=torch.float64, seed=1)
    labels = torch.tensor([[0, 6, -100], [3, 2, 1]])
    weight = torch.tensor([[1.0, 0.5, 2.0], [0.0, 3.0, -1.0]])

    def loss(student):
        return xk.kl_div(
            student, teacher, labels, divergence=divergence, temperature=temperature,
            ce_weight=ce_weight, reduction=reduction, row_weight=weight, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student,))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, (student,))


@EVERY_BACKEND
def test_matches_torch(backend):
    student, teacher = normal(9, 100), normal(9, 100, seed=1)
    T = 3.0
    want = F.kl_div(
        F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="batchmean"
    )
    got = xk.kl_div(student, teacher, temperature=T, reduction="batchmean", backend=backend)
    assert_close(got, T**2 * want)
    labels = torch.arange(9) * 11
    only_ce = xk.kl_div(student, teacher, labels, ce_weight=1.0, kl_weight=0.0, backend=backend)
    assert_close(only_ce, F.cross_entropy(student, labels))


@EVERYWHERE_TOO
def test_reductions_and_weights(backend):
    student, teacher = normal(2, 3, 20), normal(2, 3, 20, seed=1)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    weight = torch.tensor([[0.5, 9.0, 0.0], [2.0, 1.0, 9.0]])

    def loss(reduction, **how):
        return xk.kl_div(student, teacher, labels, reduction=reduction, backend=backend, **how)

    rows = loss("none")
    assert rows.shape == (2, 3) and (rows[labels == -100] == 0).all()
    assert_close(loss("none", row_weight=weight), rows * weight)
    assert_close(loss("sum", row_weight=weight), (rows * weight).sum())
    assert_close(loss("mean", row_weight=weight), (rows * weight).sum() / 4)
    assert_close(loss("batchmean", row_weight=weight), (rows * weight).sum() / 6)


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
def test_masked_vocabulary_equals_a_narrower_one(backend, divergence):
    student, teacher = normal(4, 40), normal(4, 40, seed=1)
    labels = torch.tensor([3, 0, 7, 1])
    how = {"divergence": divergence, "ce_weight": 0.2, "temperature": 2.0, "backend": backend}
    want, want_grad = gradient(student[:, :30], teacher[:, :30], labels, **how)
    student[:, 30:], teacher[:, 30:] = -INF, -INF
    got, got_grad = gradient(student, teacher, labels, **how)
    assert_close(got, want)
    assert_close(got_grad[:, :30], want_grad)
    assert (got_grad[:, 30:] == 0).all()


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("V", [5, 40, 3000])
def test_wider_and_narrower_teacher(backend, divergence, V):
    student, teacher = normal(4, V), normal(4, V + 24, seed=1)
    padded = F.pad(student, (0, 24), value=-INF)
    how = {"divergence": divergence, "reduction": "none", "backend": backend}
    wide, wide_grad = gradient(student, teacher, **how)
    want, want_grad = gradient(padded, teacher, **how)
    assert_close(wide, want)
    assert_close(wide_grad, want_grad[:, :V])
    assert torch.isinf(wide).all() == (divergence == "forward")
    narrow, narrow_grad = gradient(teacher, student, **how)
    want, want_grad = gradient(teacher, padded, **how)
    assert_close(narrow, want)
    assert_close(narrow_grad, want_grad, equal_nan=True)
    assert torch.isinf(narrow).all() == (divergence == "reverse")


@EVERYWHERE_TOO
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("mass", [0.0, -50.0])
def test_infinite_where_the_other_is_masked(backend, divergence, mass):
    """Infinite however little mass meets the mask, and in that row alone."""
    student, teacher = normal(3, 50, dtype=torch.float64), normal(3, 50, seed=1)
    first, second = (teacher, student) if divergence == "forward" else (student, teacher)
    first[1, 7], second[1, 7] = mass, -INF
    loss, grad = gradient(
        student.float(), teacher, divergence=divergence, reduction="none", backend=backend
    )
    assert torch.isinf(loss).tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()
    if divergence == "forward":  # q - p
        want = student[1].softmax(-1) - teacher[1].double().softmax(-1)
        assert_close(grad[1], want.float())
    else:
        assert not grad[1].isfinite().any()


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_divergence_of_weight_0_has_no_say(backend, divergence, where):
    """Not even an infinite one, as at the begin of a schedule."""
    student, teacher = normal(3, 50), normal(3, 50, seed=1)
    labels = torch.tensor([0, 1, 2])
    (student if where == "student" else teacher)[:, 40:] = -INF
    how = {"divergence": divergence, "ce_weight": 1.0, "kl_weight": 0.0, "backend": backend}
    leaf = student.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels)
    got = gradient(student, teacher, labels, **how)
    assert_close(got, (want.detach(), torch.autograd.grad(want, leaf)[0]))


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), INF])
def test_nan_and_inf_stay_in_their_row(backend, divergence, where, value):
    for dtype, V in ((torch.float32, 50), (torch.bfloat16, 5000)):
        student, teacher = normal(3, V, dtype=dtype), normal(3, V, dtype=dtype, seed=1)
        (student if where == "student" else teacher)[1, V - 3] = value
        how = {"divergence": divergence, "reduction": "none", "backend": backend}
        loss, grad = gradient(student, teacher, **how)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(-1).tolist() == [False, True, False]
        assert grad[[0, 2]].isfinite().all()
        skipped = torch.tensor([1.0, 0.0, 1.0])
        loss, grad = gradient(student, teacher, row_weight=skipped, **how)
        assert loss.isfinite().all() and (grad[1] == 0).all()


@EVERYWHERE_TOO
@pytest.mark.parametrize("weight", [float("nan"), INF])
def test_an_ignored_row_counts_nothing_whatever_its_weight(backend, weight):
    student, teacher = normal(4, 50), normal(4, 50, seed=1)
    labels, weights = torch.tensor([0, -100, 2, 3]), torch.tensor([1.0, weight, 1.0, 1.0])
    for reduction in ("none", "mean"):
        how = {"ce_weight": 0.5, "reduction": reduction, "backend": backend}
        want = gradient(student, teacher, labels, **how)
        assert_close(gradient(student, teacher, labels, row_weight=weights, **how), want)


@EVERY_BACKEND
def test_nan_of_every_payload_stays(backend):
    weight = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    student, teacher = normal(2, 64, dtype=torch.bfloat16), normal(2, 64, seed=1)
    loss, grad = gradient(student, teacher, row_weight=weight, reduction="none", backend=backend)
    assert loss.isnan().all() and grad.isnan().all()


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@EVERY_DTYPE
def test_a_row_that_is_ignored_or_wholly_masked_counts_nothing(backend, divergence, dtype):
    student, teacher = normal(4, 33, dtype=dtype), normal(4, 33, dtype=dtype, seed=1)
    student[0], teacher[1], student[2] = -INF, -INF, float("nan")
    labels = torch.tensor([5, 5, -1, 5])
    how = {"divergence": divergence, "ce_weight": 0.5, "ignore_index": -1, "backend": backend}
    loss, grad = gradient(student, teacher, labels, reduction="none", **how)
    assert (loss[:3] == 0).all() and loss[3] > 0
    assert (grad[:3] == 0).all() and (grad[3] != 0).any()
    mean, _ = gradient(student, teacher, labels, **how)
    assert_close(mean, loss[3] / 3)


@EVERYWHERE_TOO
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_no_row_left_is_zero(backend, reduction):
    how = {"reduction": reduction, "backend": backend}
    labels = torch.full((3,), -100)
    loss, grad = gradient(normal(3, 9), normal(3, 9), labels, ce_weight=1.0, **how)
    assert loss == 0 and (grad == 0).all()
    loss, grad = gradient(normal(0, 9), normal(0, 9), **how)
    assert loss == 0 and grad.shape == (0, 9)
    student, none = normal(3, 9).requires_grad_(), normal(0, 9)
    loss = xk.kl_div(student[:0] * 1, none, inplace_grad=True, **how)
    assert loss == 0 and (torch.autograd.grad(loss, student)[0] == 0).all()
    for shape in ((2, 0), (2, 0, 2, 0)):
        logits = normal(*shape, 9)
        loss, grad = gradient(logits, logits, reduction="none", backend=backend)
        assert loss.shape == shape and grad.shape == (*shape, 9)


@EVERYWHERE_TOO
def test_one_class_and_no_leading_axis(backend):
    loss, grad = gradient(normal(5, 1), normal(5, 1, seed=1), reduction="sum", backend=backend)
    assert loss == 0 and (grad == 0).all()
    loss, grad = gradient(normal(9), normal(9, seed=1), reduction="none", backend=backend)
    assert loss.shape == () and grad.shape == (9,)


@EVERY_BACKEND
@EVERY_DIVERGENCE
def test_equal_logits_give_exactly_zero(backend, divergence):
    logits = normal(5, 3000)
    loss, grad = gradient(logits, logits, divergence=divergence, reduction="none", backend=backend)
    assert (loss == 0).all() and (grad == 0).all()


@EVERY_BACKEND
@EVERY_DIVERGENCE
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_equal_logits(backend, divergence, apart):
    """As KL -> 0 the loss stays positive, and the gradient beats torch's own in float32."""
    tensors = inputs(Case(divergence=divergence, V=32000, offset=20.0, N=8, apart=apart))
    how = {"divergence": divergence, "reduction": "none"}
    student, teacher = tensors["student"], tensors["teacher"]
    exact, exact_grad = gradient(student.double(), teacher.double(), backend="reference", **how)
    loss, grad = gradient(student, teacher, backend=backend, **how)
    a = student.clone().requires_grad_()
    log_q, log_p = F.log_softmax(a, -1), F.log_softmax(teacher, -1)
    pair = (log_q, log_p) if divergence == "forward" else (log_p, log_q)
    plain = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    (plain_grad,) = torch.autograd.grad(plain.sum(), a)
    error, plain_error = ((g - exact_grad).norm() / exact_grad.norm() for g in (grad, plain_grad))
    print(f"KL {exact.mean():.1e}: gradient error {error:.1e}, torch {plain_error:.1e}")
    assert error <= plain_error
    assert (loss >= 0).all() and (loss - exact).abs().max() <= 1e-7


@EVERY_BACKEND
@pytest.mark.parametrize("scale", [1e6, 1e12, 1e30])
def test_huge_logits(backend, scale):
    student, teacher = scale * normal(6, 200), scale * normal(6, 200, seed=1)
    teacher[0] = student[0]
    how = {"reduction": "none", "backend": backend}
    exact, exact_grad = gradient(
        student.double(), teacher.double(), reduction="none", backend="reference"
    )
    loss, grad = gradient(student, teacher, **how)
    assert_close(loss, exact.float())
    assert_close(grad, exact_grad.float())


@EVERY_BACKEND
def test_labels_at_every_position(backend):
    V = 2100
    student, teacher = normal(V, V), normal(V, V, seed=1)
    how = {"ce_weight": 1.0, "kl_weight": 0.0, "reduction": "sum", "backend": backend}
    _, grad = gradient(student, teacher, torch.arange(V), **how)
    assert_close(grad, student.softmax(-1) - torch.eye(V))


# On a device a label is not looked at before the kernel runs: test_kl_div_cuda.py.
@pytest.mark.parametrize("backend", [backend for backend in EVERYWHERE if backend != "cuda"])
@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_label_out_of_range(backend, label):
    labels = torch.tensor([[0, 1], [label, -100]])
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 9\).* got {label} at row 2"):
        xk.kl_div(normal(2, 2, 9), normal(2, 2, 9), labels, ce_weight=1.0, backend=backend)


@EVERY_BACKEND
def test_rows_beyond_int32(backend):
    """Two rows 2^31 elements apart, in memory that is only reserved."""
    apart, V = 2**31 + 64, 100
    maps = [mmap.mmap(-1, 2 * (apart + V)) for _ in range(2)]
    far = [torch.frombuffer(m, dtype=torch.bfloat16).as_strided((2, V), (apart, 1)) for m in maps]
    near = [normal(2, V, dtype=torch.bfloat16, seed=seed) for seed in range(2)]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    want, want_grad = gradient(*near, backend=backend)
    got, got_grad = gradient(*far, backend=backend)
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)
    call = (None, None, *Options(), backend)
    assert torch.equal(op.overwrite(*far, *call), want)
    assert torch.equal(far[0], want_grad)


@EVERY_BACKEND
def test_many_short_rows(backend):
    student, teacher = normal(70_000, 3), normal(70_000, 3, seed=1)
    got = gradient(student, teacher, backend=backend)
    for a, b in zip(got, gradient(student, teacher, backend="reference"), strict=True):
        assert_close(a, b)


logit = st.one_of(st.floats(-30, 30, width=32), st.just(-INF), st.floats(-1e5, 1e5, width=32))


@st.composite
def logit_rows(draw):
    N, V, W = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rows = [draw(st.lists(logit, min_size=n, max_size=n)) for n in (N * V, N * W)]
    return torch.tensor(rows[0]).view(N, V), torch.tensor(rows[1]).view(N, W)


@EVERY_BACKEND
@EVERY_DIVERGENCE
@given(logits=logit_rows())
def test_any_masks_and_widths(backend, divergence, logits):
    student, teacher = (part.double() for part in logits)
    how = {"divergence": divergence, "reduction": "none", "temperature": 3.0}
    got, got_grad = gradient(student, teacher, backend=backend, **how)
    want, want_grad = gradient(student, teacher, backend="reference", **how)
    assert_close(got, want)
    finite = want.isfinite() if divergence == "reverse" else ~want.isnan()
    assert_close(got_grad[finite], want_grad[finite])
