"""xk.topk_kl_div on every backend against the float64 reference, that against kl_div and formulas,
and every corner."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kl_div_cases import DTYPES, short
from topk_cases import BACKENDS, KINDS, check_topk, gradient, inputs
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div.options import DIVERGENCES, Options
from xlstm_kernels.ops.topk_kl_div import op
from xlstm_kernels.ops.topk_kl_div.support import SUPPORTS, WITH_TAIL

INF = float("inf")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERYWHERE = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
EVERY_KIND = pytest.mark.parametrize(("support", "divergence"), KINDS)


ACCURACY = [
    *itertools.product(KINDS, [(400, 24), (4500, 256)], DTYPES, [{}]),
    *itertools.product(
        KINDS,
        [(2100, 64)],
        DTYPES[:2],
        [{"temperature": 2.0, "ce_weight": 0.3}, {"ce_weight": 0.9, "label_smoothing": 0.1}],
    ),
    *itertools.product(
        [("tail", "forward"), ("both", "js")],
        [(2100, 64)],
        DTYPES,
        [{"temperature": 3.0, "ce_weight": 0.3, "softcap": 20.0, "z_loss": 1e-3}],
    ),
]
CASES = [
    pytest.param(*case, id="-".join(map(str, (*case[0], *case[1], short(case[2]), *case[3]))))
    for case in ACCURACY
]


@EVERY_BACKEND
@pytest.mark.parametrize(("kind", "sizes", "dtype", "options"), CASES)
def test_against_the_oracle(backend, kind, sizes, dtype, options):
    check_topk(backend, kind, *sizes, dtype, **options)


@EVERYWHERE
@EVERY_KIND
def test_gradcheck(backend, support, divergence):
    student, logprobs, ids = inputs(N=3, V=9, K=4)
    how = {"support": support, "divergence": divergence, "temperature": 1.5, "ce_weight": 0.3}
    labels, weight = torch.tensor([0, -100, 8]), torch.tensor([1.0, 2.0, -0.5])

    def loss(student):
        return xk.topk_kl_div(
            student, logprobs, ids, labels, row_weight=weight, backend=backend, **how
        )

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@EVERYWHERE
@EVERY_KIND
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 4.0, 100.0])
def test_all_words_are_the_dense_loss(backend, support, divergence, temperature):
    """In any order, and whatever the support: nothing is outside."""
    student, teacher = inputs(V=60)[0], inputs(V=60, seed=1)[0]
    order = torch.randperm(60)
    logprobs, ids = teacher.log_softmax(-1)[:, order], order.expand(5, -1)
    if support == "sampled":  # the temperature leaves the weights alone
        logprobs = (teacher / temperature).log_softmax(-1)[:, order]
    how = {"divergence": divergence, "temperature": temperature, "backend": backend}
    got = gradient(student, logprobs, ids, support=support, **how)
    how["backend"] = "reference"
    want = xk.kl_div(student.requires_grad_(), teacher, **how)
    assert_close(got[0], want.detach(), rtol=1e-9, atol=1e-12)
    assert_close(got[1], torch.autograd.grad(want, student)[0], rtol=1e-9, atol=1e-12)


@EVERYWHERE
def test_supports_by_their_formulas(backend):
    student, logprobs, ids = inputs()
    p, q = logprobs.exp(), student.softmax(-1)
    q_inside = q.gather(-1, ids)
    r = 1 - p.sum(-1)
    want = {
        "truncated": (p * (p / q_inside).log()).sum(-1),
        "renormalized": ((p / (1 - r)[:, None]) * (p / (1 - r)[:, None] / q_inside).log()).sum(-1),
        "tail": (p * (p / q_inside).log()).sum(-1) + r * (r / (1 - q_inside.sum(-1))).log(),
    }
    for support, loss in want.items():
        how = {"support": support, "reduction": "none", "backend": backend}
        assert_close(xk.topk_kl_div(student, logprobs, ids, **how), loss)
    p, q = logprobs.log_softmax(-1), student.gather(-1, ids).log_softmax(-1)
    loss, grad = gradient(student, logprobs, ids, support="both", reduction="none", backend=backend)
    assert_close(loss, (p.exp() * (p - q)).sum(-1))
    outside = torch.ones_like(grad, dtype=torch.bool).scatter(-1, ids, False)
    assert (grad[outside] == 0).all()


@EVERYWHERE
def test_the_tail_is_a_sum_not_a_difference(backend):
    """1 - sum p has no digits left here; the tail as given, and the student's own, have all."""
    student, _, _ = inputs(V=50, K=4)
    student[:, :4] += 60
    teacher = student + 0.1 * inputs(V=50, seed=1)[0]
    ids = torch.arange(4).expand(5, -1)
    log_p = teacher.log_softmax(-1)
    tail = log_p[:, 4:].logsumexp(-1)
    log_q_tail = student.log_softmax(-1)[:, 4:].logsumexp(-1)
    student_32, log_p_32, tail_32 = student.float(), log_p[:, :4].float(), tail.float()
    how = {"tail_logmass": tail_32, "divergence": "reverse", "reduction": "none"}
    loss, grad = gradient(student_32, log_p_32, ids, backend=backend, **how)
    assert loss.isfinite().all() and grad.isfinite().all()
    student[:, 4:] += 100  # now the student's mass is outside, where the teacher has none
    loss, _ = gradient(student.float(), log_p_32, ids, backend=backend, **how)
    want = -tail + (student.log_softmax(-1)[:, 4:].logsumexp(-1))
    assert_close(loss, want.float(), rtol=1e-5, atol=1e-4)
    assert (log_q_tail < -30).all()


@EVERYWHERE
@EVERY_KIND
def test_padding_and_repetition(backend, support, divergence):
    student, logprobs, ids = inputs()
    how = {"support": support, "divergence": divergence, "temperature": 2.0, "backend": backend}
    if support in WITH_TAIL:
        how["tail_logmass"] = torch.full((5,), -2.0, dtype=torch.float64)
    want = gradient(student, logprobs, ids, **how)
    more = torch.full((5, 3), -1)
    nan = torch.full((5, 3), float("nan"), dtype=torch.float64)
    padded = torch.cat([more, ids], -1), torch.cat([nan, logprobs], -1)
    twice = torch.cat([ids, ids], -1)
    parts = torch.cat(
        [logprobs + torch.tensor(0.25).log(), logprobs + torch.tensor(0.75).log()], -1
    )
    assert_close(gradient(student, padded[1], padded[0], **how), want)
    assert_close(gradient(student, parts, twice, **how), want, rtol=1e-6, atol=1e-7)


@EVERYWHERE
def test_draws_are_unbiased(backend):
    """The expected gradient of plain draws is that of the whole teacher."""
    student, teacher = inputs(N=1, V=30)[0], inputs(N=1, V=30, seed=1)[0]
    n = 200_000
    ids = torch.multinomial(teacher[0].softmax(-1), n, replacement=True)
    ids, counts = ids.unique(return_counts=True)
    _, grad = gradient(
        student, counts.log().double()[None], ids[None], support="sampled", backend=backend
    )
    assert (grad - (student.softmax(-1) - teacher.softmax(-1))).abs().max() < 5 / n**0.5


@EVERYWHERE
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_nan_shows_wherever_a_row_counts(backend, support, kl_weight):
    student, logprobs, ids = inputs(N=4)
    student[0], logprobs[0, 0] = -INF, float("nan")
    logprobs[1, 0] = float("nan")
    student[2] = -INF
    weight = torch.tensor([1.0, 1.0, INF, 1.0], dtype=student.dtype)
    how = {"support": support, "kl_weight": kl_weight, "reduction": "none", "backend": backend}
    labels = torch.arange(4)
    loss, grad = gradient(student, logprobs, ids, labels, row_weight=weight, ce_weight=0.5, **how)
    assert loss[:3].isnan().all() and grad[:3].isnan().all()
    assert loss[3].isfinite() and grad[3].isfinite().all()


@EVERYWHERE
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_without_student_mass_inside(backend, divergence):
    """q is 0 there: what is left of the divergence is a number that no logit changes."""
    student, logprobs, ids = inputs(N=2)
    student[0, ids[0]] = -INF
    how = {"support": "both", "divergence": divergence, "reduction": "none"}
    loss, grad = gradient(student, logprobs, ids, backend=backend, **how)
    want, _ = gradient(student, logprobs, ids, backend="reference", **how)
    assert_close(loss, want)
    assert (grad[0] == 0).all() and (grad[1] != 0).any()


@EVERYWHERE
@pytest.mark.parametrize("support", SUPPORTS)
def test_masked_and_missing(backend, support):
    student, logprobs, ids = inputs(N=6)
    student[0] = -INF  # no student
    student[1, ids[1, 0]] = -INF  # infinite: the teacher has mass there
    ids[2] = -1  # no teacher
    logprobs[3, 0] = float("nan")
    student[4, 7] = float("nan")
    how = {"support": support, "reduction": "none", "backend": backend}
    loss, grad = gradient(student, logprobs, ids, **how)
    assert loss[0] == 0 and (grad[0] == 0).all()
    assert loss[1] == INF and grad[1].isfinite().all() and grad[1, ids[1, 0]] <= 0
    assert loss[2] == 0 and grad[2].abs().max() < 1e-30  # its tail is all there is
    assert loss[3:5].isnan().all() and grad[3:5].isnan().all()
    assert loss[5].isfinite() and grad[5].isfinite().all()
    labels = torch.full((6,), -100)
    loss, grad = gradient(student, logprobs, ids, labels, ce_weight=1.0, backend=backend)
    assert loss == 0 and (grad == 0).all()
    loss, grad = gradient(student[:0], logprobs[:0], ids[:0], backend=backend)
    assert loss == 0 and grad.shape == (0, 400)


@EVERYWHERE
@pytest.mark.parametrize("far", [120.0, 1e3, 1e6])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_words_inside_far_below_those_outside(backend, far, divergence):
    """The student's softmax over them alone does not care how far."""
    student, logprobs, ids = inputs(dtype=torch.float32)
    outside = torch.ones_like(student).scatter(-1, ids, 0.0)
    labels = outside.argmax(-1)
    how = {"support": "both", "divergence": divergence, "reduction": "none", "ce_weight": 0.1}
    far_away = student.round() + far * outside  # exact in float32
    far_away[1] = -far - outside[1]
    far_away[1, ids[1]] = -INF
    want = gradient(far_away.double(), logprobs, ids, labels, backend="reference", **how)
    got = gradient(far_away, logprobs, ids, labels, backend=backend, **how)
    for part, exact in zip(got, want, strict=True):
        assert_close(part.double(), exact, rtol=1e-4, atol=1e-5)


@EVERYWHERE
def test_recipe(backend):
    student, logprobs, ids = inputs()
    labels = ids[:, 3]
    got = xk.topk_kl_div(student, logprobs, ids, labels, backend=backend, **xk.XLSTM_RECIPE)
    both = xk.topk_kl_div(student, logprobs, ids, support="both", backend=backend)
    hard = torch.nn.functional.cross_entropy(student, labels)
    assert_close(got, 0.9 * hard + 0.1 * both)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_inplace_and_views_give_the_same(backend, dtype, softcap):
    student, logprobs, ids = inputs(N=6, V=2300, dtype=dtype)
    labels = torch.tensor([0, -100, 2, 3, 4, int(ids[5, 1])])
    how = {"ce_weight": 0.4, "softcap": softcap, "temperature": 2.0, "backend": backend}
    loss, grad = gradient(student, logprobs, ids, labels, **how)
    leaf = student.view(2, 3, -1).repeat(1, 2, 1).requires_grad_()
    shaped = (x.view(2, 3, *x.shape[1:]) for x in (logprobs, ids, labels))
    view = (leaf * 1)[:, :3]
    again = xk.topk_kl_div(view, *shaped, inplace_grad=True, **how)
    (found,) = torch.autograd.grad(again, leaf)
    if dtype is not torch.float16:  # rounded in another place
        assert torch.equal(again, loss)
        assert torch.equal(found[:, :3].reshape(6, -1), grad)
    assert (found[:, 3:] == 0).all()


@EVERY_BACKEND
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_backward_gives_the_same(backend, reduction, threads):
    student, logprobs, ids = inputs(N=40, V=5000, dtype=torch.float32)
    student.requires_grad_()
    results = []
    for count in (1, 3):
        threads(count)
        loss = xk.topk_kl_div(student, logprobs, ids, reduction=reduction, backend=backend)
        for _ in range(2):
            (grad,) = torch.autograd.grad(
                loss, student, 2 * torch.ones_like(loss), retain_graph=True
            )
            results.append(grad.clone())
    assert all(torch.equal(grad, results[0]) for grad in results[1:])
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss), create_graph=True)
    with pytest.raises(NotImplementedError, match=r"topk_kl_div: backend .* no second derivative"):
        grad.sum().backward()


@pytest.mark.medium
@EVERY_BACKEND
def test_opcheck_and_compile(backend):
    torch.compiler.reset()
    student, logprobs, ids = inputs(dtype=torch.float32)
    tail = torch.full((5,), -1.0)
    for more in ((None, None, None), (tail, ids[:, 0], torch.rand(5))):
        call = (logprobs, ids, *more, *Options(ce_weight=0.0, reduction="none"), "tail")
        torch.library.opcheck(op.forward, (student, *call, True, backend))
        torch.library.opcheck(op.overwrite, (student.clone(), *call, backend))

    def loss(student, logprobs, ids):
        return xk.topk_kl_div(student * 2, logprobs, ids, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student.requires_grad_()
    for x, y in zip(
        *((f, *torch.autograd.grad(f, student)) for f in
          (g(student, logprobs, ids) for g in (loss, compiled))),
        strict=True,
    ):  # fmt: skip
        assert_close(x, y)


@st.composite
def problems(draw):
    V, K = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    logit = st.one_of(st.floats(-30, 30), st.just(-INF))
    student = draw(st.lists(logit, min_size=V, max_size=V))
    logprobs = draw(st.lists(st.one_of(st.floats(-20, 0), st.just(-INF)), min_size=K, max_size=K))
    ids = draw(st.lists(st.integers(-1, V - 1), min_size=K, max_size=K))
    tail = draw(st.one_of(st.none(), st.floats(-20, 0), st.just(-INF)))
    as_row = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    return as_row(student), as_row(logprobs), torch.tensor([ids]), tail


@EVERY_BACKEND
@pytest.mark.parametrize(("support", "divergence"), KINDS)
@given(problem=problems())
def test_any_rows(backend, support, divergence, problem):
    student, logprobs, ids, tail = problem
    how = {"support": support, "divergence": divergence, "reduction": "none", "temperature": 2.0}
    if support in WITH_TAIL and tail is not None:
        how["tail_logmass"] = torch.tensor([tail], dtype=torch.float64)
    got, got_grad = gradient(student, logprobs, ids, backend=backend, **how)
    want, want_grad = gradient(student, logprobs, ids, backend="reference", **how)
    assert_close(got, want, rtol=1e-6, atol=1e-9)
    if divergence != "tv" and want.isfinite().all():
        assert_close(got_grad, want_grad, rtol=1e-6, atol=1e-9)


S, P, IDS = inputs(N=4, V=9, K=2, dtype=torch.float32)
LABELS = torch.zeros(4, dtype=torch.int64)
TAIL = torch.zeros(4)
WRONG = [
    (ValueError, (S, P, IDS), {"support": "top"}, "'truncated', 'sampled', got 'top'"),
    (ValueError, (S, P, IDS), {"support": "both", "tail_logmass": TAIL}, "must be None"),
    (ValueError, (S, P, IDS), {"support": "truncated", "divergence": "js"}, "must be 'forward'"),
    (ValueError, (S, P, IDS), {"support": "sampled", "divergence": "reverse"}, "is infinite"),
    (ValueError, (S, P, IDS), {"tail_logmass": TAIL[:3]}, "tail_logmass must have"),
    (ValueError, (S, P[:3], IDS[:3]), {}, "topk_logprobs must have"),
    (ValueError, (S, P, IDS[:, :1]), {}, "topk_ids must have the shape of topk_logprobs (4, 2)"),
    (TypeError, (S, P, P), {}, "topk_ids must be integers, got torch.float32"),
    (TypeError, (S, IDS, IDS), {}, "topk_logprobs must be floating point, got torch.int64"),
    (ValueError, (S, P[:, :0], IDS[:, :0]), {}, "must be (..., K), K >= 1, got (4, 0)"),
    (ValueError, (S, P, IDS), {"ce_weight": 0.5}, "labels are needed"),
    (ValueError, (S, P, IDS), {"temperature": 0.0}, "temperature must be in"),
    (ValueError, (S, P, IDS + 9), {}, "topk_ids must be in [0, 9) or -1 for none, got"),
    (ValueError, (S, P, IDS - 10), {}, "topk_ids must be in [0, 9) or -1 for none, got"),
    (ValueError, (S, P, IDS, LABELS + 9), {}, "labels must be in [0, 9)"),
    (ValueError, (S, P.clone().requires_grad_(), IDS), {}, "must not require a gradient"),
]  # fmt: skip


@EVERYWHERE
@pytest.mark.parametrize(("kind", "args", "how", "text"), WRONG, ids=[w[3][:50] for w in WRONG])
def test_errors(backend, kind, args, how, text):
    if backend == "cuda" and " must be in [0, 9)" in text:
        pytest.skip("on a device no value is looked at before the kernel runs; NaN, tested below")
    with pytest.raises(kind, match="topk_kl_div: .*" + re.escape(text)):
        xk.topk_kl_div(*args, backend=backend, **how)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("id", [-2, 400, 2**40])
def test_an_id_out_of_range_makes_its_row_nan(backend, id):
    student, logprobs, ids = inputs(dtype=torch.float32)
    ids[2, 7] = id
    loss, grad = gradient(student, logprobs, ids, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert grad.isnan().all(-1).tolist() == [False, False, True, False, False]
    assert grad[[0, 1, 3, 4]].isfinite().all()
