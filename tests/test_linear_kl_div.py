"""xk.linear_kl_div and its kin on every backend: values and gradients against the float64 oracle,
memory, the products that run, and every corner."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kl_div_cases import DTYPES
from linear_cases import BACKENDS, EVERYWHERE, FUNCTIONS, Case, check_case, inputs, run
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels import gemm
from xlstm_kernels.ops.kl_div.options import Options
from xlstm_kernels.ops.linear_kl_div import plan
from xlstm_kernels.ops.topk_kl_div.support import SUPPORTS

INF, NAN = float("inf"), float("nan")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERYWHERE_TOO = pytest.mark.parametrize("backend", EVERYWHERE)
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)


def cases(**axes) -> list:
    """pytest parameters: the product of the axes for each backend."""
    axes = {"backend": BACKENDS, **axes}
    found = [
        Case(**dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values())
    ]
    return [pytest.param(case, id=str(case)) for case in found]


ACCURACY = [
    *cases(function=FUNCTIONS, dtype=DTYPES, chunk_rows=[None, 1, 5], bias=[False, True]),
    *cases(function=FUNCTIONS, dtype=DTYPES, reduction=["none", "sum", "batchmean"],
           ce_weight=[0.4], weighted=[False, True], chunk_rows=[7], bias=[True]),
    *cases(dtype=DTYPES, divergence=["forward", "reverse"], temperature=[0.5, 4.0],
           ce_weight=[0.0, 0.3], V=[257]),
    *cases(dtype=DTYPES, divergence=["js", "tv"], chunk_rows=[5]),
    *cases(function=["linear_topk_kl_div"], dtype=DTYPES, support=SUPPORTS, chunk_rows=[5],
           weighted=[True], ce_weight=[0.4], temperature=[1.0, 2.0]),
    *cases(dtype=DTYPES, weight_dtype=DTYPES),
    *cases(dtype=DTYPES, teacher_dtype=DTYPES),
    *cases(dtype=DTYPES, divergence=["reverse"], V=[324], teacher_V=[348], bias=[True]),
    *cases(dtype=DTYPES, V=[324], teacher_V=[300], bias=[True]),
    *cases(dtype=DTYPES, V=[1, 15], E=[1, 33], N=[1]),
    *cases(dtype=DTYPES, V=[3000], E=[33], N=[5]),
    # More rows than the gradient by all logits is kept of.
    *cases(function=FUNCTIONS, dtype=[torch.bfloat16], E=[4], weighted=[True], chunk_rows=[5]),
    *cases(dtype=DTYPES, layout=["head_first", "expanded", "strided"], chunk_rows=[None, 4]),
]  # fmt: skip


@pytest.mark.parametrize("case", ACCURACY)
def test_against_the_oracle(case):
    check_case(case)


@EVERY_BACKEND
@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_product_of_two_bytes(backend, function, dtype, monkeypatch):
    """Where torch brings no bfloat16 product with a float32 result, and with weights in blocks."""
    monkeypatch.setattr(plan, "BLOCK_BYTES", 4 * 20 * 77)
    monkeypatch.setattr(gemm, "_bf16_gemm", lambda: None)
    for chunk_rows in (None, 5):
        check_case(Case(backend, function, dtype, chunk_rows=chunk_rows, bias=True))


@EVERYWHERE_TOO
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("ce_weight", "temperature"), [(0.0, 1.5), (0.4, 1.5)])
def test_gradcheck(backend, reduction, ce_weight, temperature):
    case = Case(dtype=torch.float64, N=3, E=3, V=7, teacher_E=2, ce_weight=ce_weight, bias=True)
    tensors = inputs(case)
    head = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        return xk.linear_kl_div(
            hidden, weight, tensors["teacher_hidden"], tensors["teacher_weight"],
            tensors.get("labels"), student_bias=bias, teacher_bias=tensors["teacher_bias"],
            ce_weight=ce_weight, temperature=temperature, reduction=reduction, chunk_rows=4,
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, head)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, head)


@EVERY_BACKEND
def test_matches_torch(backend):
    t = inputs(Case(ce_weight=1.0, bias=True))
    student = F.linear(t["hidden"], t["weight"], t["bias"])
    teacher = F.linear(t["teacher_hidden"], t["teacher_weight"], t["teacher_bias"])
    head, labels = (t["hidden"], t["weight"]), t["labels"]
    got = xk.linear_cross_entropy(*head, labels, bias=t["bias"], backend=backend)
    assert_close(got, F.cross_entropy(student.flatten(0, 1), labels.flatten()))
    got = xk.linear_kl_div(
        *head, t["teacher_hidden"], t["teacher_weight"], student_bias=t["bias"],
        teacher_bias=t["teacher_bias"], reduction="sum", temperature=3.0, backend=backend,
    )  # fmt: skip
    log_q, p = F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1)
    assert_close(got, 9 * F.kl_div(log_q, p, reduction="sum"))


OTHER_OPTIONS = {
    "divergence": "skew", "beta": 0.3, "temperature": 2.0, "ce_weight": 0.25, "kl_weight": 0.5,
    "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "teacher_softcap": 6.0,
    "ignore_index": 3, "reduction": "batchmean",
}  # fmt: skip


@EVERYWHERE_TOO
@pytest.mark.parametrize("name", Options._fields)
def test_options_are_those_of_kl_div(backend, name):
    t = inputs(Case(dtype=torch.float64, ce_weight=0.5))
    t["labels"] %= 10
    how = {"divergence": "js", "ce_weight": 0.5, "backend": backend, name: OTHER_OPTIONS[name]}
    heads = [t[part] for part in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
    student, teacher = heads[0] @ heads[1].mT, heads[2] @ heads[3].mT
    want = xk.kl_div(student, teacher, t["labels"], **how)
    assert_close(xk.linear_kl_div(*heads, t["labels"], **how), want)
    if name in inspect.signature(xk.linear_topk_kl_div).parameters:
        words = torch.randn(2, 9, 12, dtype=torch.float64).log_softmax(-1).topk(5)
        want = xk.topk_kl_div(student, *words, t["labels"], support="both", **how)
        got = xk.linear_topk_kl_div(*heads[:2], *words, t["labels"], support="both", **how)
        assert_close(got, want)
    if name in inspect.signature(xk.linear_cross_entropy).parameters:
        how = {name: OTHER_OPTIONS[name], "backend": backend}
        hard = {"ce_weight": 1.0, "kl_weight": 0.0}
        want = xk.kl_div(student, teacher, t["labels"], **how, **hard)
        assert_close(xk.linear_cross_entropy(*heads[:2], t["labels"], **how), want)


@EVERY_BACKEND
@EVERY_FUNCTION
def test_chunks_do_not_matter(backend, function):
    whole, *others = (
        Case(backend, function, torch.float64, bias=True, reduction=reduction, chunk_rows=rows)
        for reduction in ("mean",)
        for rows in (1000, 1, 2, 5, 17)
    )
    tensors = inputs(whole)
    want = run(whole, tensors, backend)
    for case in others:
        for name, got in run(case, tensors, backend).items():
            assert_close(got, want[name], rtol=1e-12, atol=1e-15)


@EVERY_BACKEND
@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(backend, function, dtype):
    case = Case(backend, function, dtype, N=40, E=64, V=3000, bias=True, chunk_rows=32)
    tensors = inputs(case)
    first = run(case, tensors, backend)
    for _ in range(3):
        for name, got in run(case, tensors, backend).items():
            assert torch.equal(got, first[name]), name


@EVERY_BACKEND
@pytest.mark.parametrize(("apart", "KL"), [(0.3, 0.4), (0.1, 0.04), (0.03, 0.004)])
def test_gradients_keep_their_digits_as_the_student_comes_close(backend, apart, KL):
    """Peers round logits to bfloat16; here that would cost 3 to 30 % of the gradient."""
    N, E, V = 32, 256, 8000
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, E, generator=g)
    weight = (3 * torch.randn(V, E, generator=g) / E**0.5).bfloat16()
    teacher = (hidden + apart * torch.randn(N, E, generator=g)).bfloat16()
    hidden = hidden.bfloat16()

    def gradients(loss, *head):
        head = [part.detach().requires_grad_() for part in head]
        value = loss(*head)
        return [value.detach(), *torch.autograd.grad(value, head)]

    def fused(h, w):
        return xk.linear_kl_div(h, w, teacher, weight, chunk_rows=20, backend=backend)

    def two_bytes(h, w):
        return xk.kl_div(h @ w.mT, teacher @ weight.mT, backend=backend)

    def exactly(h, w):
        return xk.linear_kl_div(h, w, teacher.double(), weight.double(), backend="reference")

    exact, *want = gradients(exactly, hidden.double(), weight.double())
    assert 0.5 * KL < exact < 2 * KL
    loss, *ours = gradients(fused, hidden, weight)
    rounded = gradients(two_bytes, hidden, weight)[1:]
    assert abs(loss - exact) < 1e-5 * exact
    for name, a, b, c in zip(("hidden", "weight"), ours, rounded, want, strict=True):
        error, theirs = ((x.double() - c).norm() / c.norm() for x in (a, b))
        print(f"KL {exact:.4f}, d{name}: {error:.1e}, of rounded logits {theirs:.1e}")
        assert error < 3e-3 < theirs / 5


@EVERYWHERE_TOO
@EVERY_FUNCTION
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_row_left_is_zero(backend, function, reduction):
    ignored = Case(backend, function, ce_weight=0.5, reduction=reduction, bias=True)
    empty = Case(backend, function, N=0, ce_weight=0.5, reduction=reduction, bias=True)
    for case in (ignored, empty):
        tensors = inputs(case)
        tensors["labels"].fill_(-100)
        results = run(case, tensors, backend)
        assert results["dweight"].shape == tensors["weight"].shape
        assert results["dhidden"].shape == tensors["hidden"].shape
        for name, got in results.items():
            assert (got == 0).all(), name


@EVERY_BACKEND
def test_ignored_rows_and_unwanted_gradients_cost_no_product(backend, monkeypatch):
    E, V, wide, other = 20, 300, 28, 350
    t = inputs(Case(N=8, E=E, V=V, teacher_E=wide, teacher_V=other, ce_weight=0.5))
    t["labels"][:] = 3
    t["labels"][1] = -100
    weight = torch.ones(2, 8)
    weight[0, :3] = 0
    t["hidden"][1], t["teacher_hidden"][0, :3] = NAN, NAN  # nobody looks at these rows
    # A GPU is not waited for to know which rows count; nobody looks at the others there either.
    rows, products = 5 if backend == "cpu" else 16, []

    def count(out, a, b, accumulate):
        products.append(a.shape[0] * a.shape[1] * b.shape[1])
        multiply(out, a, b, accumulate)

    multiply = gemm.multiply
    monkeypatch.setattr(gemm, "multiply", count)

    def cost(hidden=False, weights=False, **how):
        products.clear()
        loss = xk.linear_kl_div(
            t["hidden"].detach().requires_grad_(hidden),
            t["weight"].detach().requires_grad_(weights),
            t["teacher_hidden"], t["teacher_weight"], t["labels"], row_weight=weight,
            divergence="reverse", backend=backend, **how,
        )  # fmt: skip
        assert loss.isfinite().all()
        if hidden or weights:
            loss.sum().backward()
        return sum(products)

    student, teacher = rows * E * V, rows * wide * other
    assert cost() == student + teacher
    assert cost(hidden=True) == 2 * student + teacher
    assert cost(weights=True) == 2 * student + teacher
    assert cost(hidden=True, weights=True) == 3 * student + teacher
    assert cost(hidden=True, weights=True, ce_weight=1.0, kl_weight=0.0) == 3 * student
    # Rows have incoming gradients of their own: hidden's gradient waits for them, weight's cannot.
    assert cost(hidden=True, reduction="none") == 2 * student + teacher
    assert cost(hidden=True, weights=True, reduction="none") == 4 * student + 2 * teacher


@EVERYWHERE_TOO
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_widths_of_vocabulary_may_differ(backend, divergence):
    """Columns that one side lacks are masked, not logits of zero, and not read past the end."""
    for V, teacher_V in ((300, 324), (324, 300)):
        case = Case(backend, V=V, teacher_V=teacher_V, divergence=divergence, reduction="none")
        t = inputs(case)
        got = run(case, t, backend)
        student = (t["hidden"] @ t["weight"].mT).requires_grad_()
        teacher = t["teacher_hidden"] @ t["teacher_weight"].mT
        want = xk.kl_div(
            student, teacher, divergence=divergence, kl_weight=0.7, reduction="none",
            backend=backend,
        )  # fmt: skip
        (dz,) = torch.autograd.grad(want, student, t["dloss"])
        assert_close(got["loss"], want)
        assert_close(got["dhidden"], dz @ t["weight"], equal_nan=True)
        masked = divergence == ("forward" if teacher_V > V else "reverse")
        assert want.isinf().all() == masked


@EVERYWHERE_TOO
def test_a_bias_of_minus_infinity_masks_vocabulary(backend):
    case = Case(backend, bias=True, ce_weight=0.3)
    t = inputs(case)
    t["labels"] %= 200
    narrow = {k: v[:200] if k.endswith(("weight", "bias")) else v for k, v in t.items()}
    want = run(case, narrow, backend)
    t["bias"][200:] = t["teacher_bias"][200:] = -INF
    got = run(case, t, backend)
    assert_close(got["loss"], want["loss"])
    assert_close(got["dhidden"], want["dhidden"])
    for name in ("dweight", "dbias"):
        assert_close(got[name][:200], want[name])
        assert (got[name][200:] == 0).all()


@EVERY_BACKEND
def test_nan_stays_in_its_row(backend):
    case = Case(backend, reduction="none", chunk_rows=4)
    t = inputs(case)
    t["hidden"][1, 2] = NAN
    got = run(case, t, backend)
    bad = torch.zeros(2, 9, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(got["loss"].isnan(), bad)
    assert torch.equal(got["dhidden"].isnan().all(-1), bad)
    assert torch.equal(got["dhidden"].isnan().any(-1), bad)


@EVERYWHERE_TOO
@EVERY_FUNCTION
@pytest.mark.parametrize("label", [-1, 300])
def test_label_out_of_range(backend, function, label):
    case = Case(backend, function, ce_weight=0.5)
    t = inputs(case)
    t["labels"][1, 3] = label
    text = rf"{function}: labels must be in \[0, 300\).* got {label} at row 12"
    with pytest.raises(ValueError, match=text):
        run(case, t, backend)


@EVERYWHERE_TOO
@pytest.mark.parametrize("word", [-2, 300])
def test_word_out_of_range(backend, word):
    case = Case(backend, "linear_topk_kl_div", chunk_rows=2)
    t = inputs(case)
    t["topk_ids"][1, 3, 2] = word
    text = rf"linear_topk_kl_div: topk_ids must be in \[0, 300\) .* got {word} at row 12"
    with pytest.raises(ValueError, match=text):
        run(case, t, backend)


MEMORY = """if True:
    import torch, torch.nn.functional as F, xlstm_kernels as xk
    torch.set_num_threads(1)
    N, E, V, dtype = {N}, {E}, {V}, torch.{dtype}
    def peak():  # of this program alone: ru_maxrss begins with that of the process that forked it
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
    head = [torch.randn(n, E).to(dtype).requires_grad_() for n in (N, V)]
    teacher = torch.randn(N, E).to(dtype), torch.randn(V, E).to(dtype)
    fused = lambda h, w, *t: xk.linear_kl_div(h, w, *t, backend="cpu")
    def eager(h, w, x, y):
        return F.kl_div(F.log_softmax(h @ w.mT, -1), F.softmax(x @ y.mT, -1), reduction="batchmean")
    few = head[0][:64], head[1], teacher[0][:64], teacher[1]
    for loss in (fused, eager):  # what a process takes once
        torch.autograd.grad(loss(*few), head)
    before = peak()
    torch.autograd.grad(fused(*head, *teacher), head)
    ours = peak()
    torch.autograd.grad(eager(*head, *teacher), head)
    print(ours - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_a_tenth_of_eager_torch(dtype):
    """Of the process, in MiB, beyond a call on 64 rows. On cpu: chunks for a GPU are larger."""
    program = MEMORY.format(N=5120, E=32, V=16000, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, eager = map(int, done.stdout.split())
    print(f"{ours} MiB, eager {eager} MiB")
    assert eager > 500 and ours < 0.1 * eager


@st.composite
def small_cases(draw):
    size = st.integers(1, 6)
    V, teacher_V = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    divergence = "forward" if teacher_V <= V else "reverse"
    return Case(
        dtype=torch.float64, N=draw(size), E=draw(size), V=V, teacher_E=draw(size),
        teacher_V=teacher_V, divergence=divergence, ce_weight=draw(st.sampled_from([0.0, 0.5])),
        reduction=draw(st.sampled_from(["none", "mean"])), weighted=draw(st.booleans()),
        bias=draw(st.booleans()), chunk_rows=draw(size),
    )  # fmt: skip


@EVERY_BACKEND
@given(case=small_cases())
def test_any_shape_and_mask(backend, case):
    tensors = inputs(case)
    want = run(case, tensors, "reference")
    for name, got in run(case, tensors, backend).items():
        assert_close(got, want[name])
