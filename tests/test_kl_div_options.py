"""Options of xk.kl_div: ends of their ranges, formulas by hand, and where others' kernels fail."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import BACKENDS, EVERYWHERE
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div.options import DIVERGENCES, TEMPERATURES

INF = float("inf")
EVERYWHERE_TOO = pytest.mark.parametrize("backend", EVERYWHERE)
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def gradient(student, *args, **how):
    student = student.detach().requires_grad_()
    loss = xk.kl_div(student, *args, **how)
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    return loss.detach(), grad


@EVERYWHERE_TOO
@pytest.mark.parametrize(
    ("divergence", "beta", "end"),
    [
        ("js", 0.0, "forward"),
        ("js", 1.0, "reverse"),
        ("skew", 0.0, "forward"),
        ("skew_reverse", 0.0, "reverse"),
    ],
)
def test_mixtures_end_in_the_plain_divergences(backend, divergence, beta, end):
    student, teacher = normal(5, 40), normal(5, 40, seed=1)
    got = gradient(student, teacher, divergence=divergence, beta=beta, backend=backend)
    assert_close(got, gradient(student, teacher, divergence=end, backend=backend), rtol=0, atol=0)
    # And are near them: for js, beta times the end.
    near = abs(beta - 1e-12)
    factor = 1e-12 if divergence == "js" else 1
    loss, grad = gradient(student, teacher, divergence=divergence, beta=near, backend=backend)
    assert_close(loss, got[0] * factor, rtol=1e-3, atol=0)
    assert_close(grad, got[1] * factor, rtol=1e-3, atol=1e-5 * factor)


@EVERYWHERE_TOO
@pytest.mark.parametrize("divergence", ["skew", "skew_reverse"])
def test_a_mixture_of_nothing_else_is_zero(backend, divergence):
    student, teacher = normal(5, 40, dtype=torch.float32), normal(5, 40, seed=1)
    loss, grad = gradient(student, teacher, divergence=divergence, beta=1.0, backend=backend)
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6


@EVERYWHERE_TOO
@pytest.mark.parametrize("divergence", ["js", "skew", "skew_reverse", "tv"])
@pytest.mark.parametrize("tail", [-200.0, -1e4, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_probabilities_may_underflow(backend, divergence, tail, dtype):
    """m log m is NaN there."""
    student, teacher = normal(4, 60, dtype=dtype), normal(4, 60, seed=1, dtype=dtype)
    student[:, 20:], teacher[:, 30:] = tail, tail
    how = {"divergence": divergence, "reduction": "none"}
    loss, grad = gradient(student, teacher, backend=backend, **how)
    exact, exact_grad = gradient(student.double(), teacher.double(), backend="reference", **how)
    assert_close(loss, exact.float(), rtol=1e-5, atol=1e-6)
    assert_close(grad, exact_grad.to(dtype), rtol=2e-2, atol=1e-6)


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_bounded_where_the_other_is_masked(backend, divergence, where):
    student, teacher = normal(3, 50), normal(3, 50, seed=1)
    (student if where == "student" else teacher)[1, 7] = -INF
    loss, grad = gradient(
        student, teacher, divergence=divergence, reduction="none", backend=backend
    )
    infinite = (divergence, where) in (("forward", "student"), ("reverse", "teacher"))
    assert torch.isinf(loss).tolist() == [False, infinite, False]
    if not infinite:
        exact = gradient(student, teacher, divergence=divergence, reduction="none",
                         backend="reference")  # fmt: skip
        assert_close((loss, grad), exact)


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [*TEMPERATURES, 1e-3, 1e3])
def test_extreme_temperatures_are_finite(backend, divergence, temperature):
    student, teacher = (normal(4, 3000, seed=seed, dtype=torch.float32) for seed in (0, 1))
    labels = torch.arange(4)
    how = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.1}
    loss, grad = gradient(student, teacher, labels, backend=backend, **how)
    assert loss.isfinite() and grad.isfinite().all()


@EVERYWHERE_TOO
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hard_label_options_by_hand(backend, temperature):
    student, teacher = normal(5, 40), normal(5, 40, seed=1)
    labels = torch.tensor([0, 39, 7, -100, 5])
    how = {"ce_weight": 1.0, "kl_weight": 0.0, "temperature": temperature, "backend": backend}
    got = gradient(student, teacher, labels, label_smoothing=0.2, **how)
    leaf = student.clone().requires_grad_()
    want = F.cross_entropy(leaf, labels, label_smoothing=0.2)
    assert_close(got, (want.detach(), torch.autograd.grad(want, leaf)[0]))

    got = gradient(student, teacher, labels, z_loss=1e-2, softcap=4.0, **how)
    capped = 4 * torch.tanh(leaf / 4)
    square = capped.logsumexp(-1)[labels != -100].square().mean()
    want = F.cross_entropy(capped, labels) + 1e-2 * square
    assert_close(got, (want.detach(), torch.autograd.grad(want, leaf)[0]))


@EVERYWHERE_TOO
def test_masked_words_share_no_smoothing(backend):
    student, teacher = normal(4, 30), normal(4, 30, seed=1)
    labels = torch.arange(4)
    how = {"ce_weight": 1.0, "label_smoothing": 0.1, "softcap": 5.0, "backend": backend}
    want = gradient(student[:, :20], teacher[:, :20], labels, **how)
    student[:, 20:], teacher[:, 20:] = -INF, -INF
    loss, grad = gradient(student, teacher, labels, **how)
    assert_close((loss, grad[:, :20]), want)
    assert (grad[:, 20:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@EVERY_DIVERGENCE
def test_inplace_gradient_under_a_softcap(backend, divergence):
    """What is overwritten is read once more for the cap."""
    leaf, teacher = normal(4, 4500, dtype=torch.float32), normal(4, 4500, dtype=torch.float32)
    leaf += 0.1
    leaf.requires_grad_()
    how = {"divergence": divergence, "softcap": 5.0, "teacher_softcap": 6.0, "backend": backend}
    grads = [
        torch.autograd.grad(xk.kl_div(leaf * 1, teacher, inplace_grad=inplace, **how), leaf)[0]
        for inplace in (False, True)
    ]
    assert torch.equal(*grads)


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_nan_and_inf_show_wherever_a_row_counts(backend, divergence, value, kl_weight):
    """Beside what is wholly masked, in a teacher of no weight, as a row's weight."""
    student, teacher = (normal(6, 50, seed=seed, dtype=torch.float32) for seed in (0, 1))
    student[0], teacher[0, 7] = -INF, value
    student[1, 7], teacher[1] = value, -INF
    teacher[2, 7] = value
    student[4] = -INF
    weight, labels = torch.tensor([1.0, 1.0, 1.0, value, value, 1.0]), torch.arange(6)
    how = {"divergence": divergence, "kl_weight": kl_weight, "ce_weight": 0.5, "backend": backend}
    loss, grad = gradient(student, teacher, labels, row_weight=weight, reduction="none", **how)
    assert loss[:5].isnan().all() and grad[:5].isnan().all()
    assert loss[5].isfinite() and grad[5].isfinite().all()


@EVERYWHERE_TOO
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_a_cap_lets_a_row_that_does_not_count_hold_anything(backend, value):
    student, teacher = normal(4, 50), normal(4, 50, seed=1)
    student[:2, 7] = value
    weight, labels = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([-100, 1, 2, 3])
    how = {"softcap": 5.0, "ce_weight": 0.5, "reduction": "none", "backend": backend}
    loss, grad = gradient(student, teacher, labels, row_weight=weight, **how)
    assert (loss[:2] == 0).all() and (grad[:2] == 0).all()
    assert (loss[2:] > 0).all() and grad.isfinite().all()


@EVERYWHERE_TOO
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_the_lowest_number_is_a_number(backend, divergence, dtype, where):
    student, teacher = (normal(2, 50, seed=seed, dtype=dtype) for seed in (0, 1))
    (student if where == "student" else teacher)[0, 7] = torch.finfo(dtype).min
    how = {"divergence": divergence, "reduction": "none", "row_weight": torch.tensor([1e-3, 1.0])}
    loss, grad = gradient(student, teacher, backend=backend, **how)
    exact = student.double(), teacher.double()
    want_loss, want_grad = gradient(*exact, backend="reference", **how)
    assert_close(loss.double(), want_loss, rtol=1e-5, atol=0)
    assert_close(grad.double(), want_grad, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)


@EVERYWHERE_TOO
@EVERY_DIVERGENCE
def test_a_masked_word_of_a_heavy_row(backend, divergence):
    student, teacher = (normal(2, 50, seed=seed, dtype=torch.float32) for seed in (0, 1))
    student[:, 7] = -INF
    how = {"divergence": divergence, "reduction": "none", "backend": backend}
    _, grad = gradient(student, teacher, row_weight=torch.tensor([1.0, 1e6]), **how)
    assert grad.isfinite().all() and ((grad[:, 7] == 0).all() or divergence == "forward")
