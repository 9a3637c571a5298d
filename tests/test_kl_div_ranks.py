"""process_group: a vocabulary that is split over several processes gives the loss and the gradients
of one process that holds all of it."""

from __future__ import annotations

import inspect
import itertools
import zlib
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from kl_div_cases import short
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.testing import assert_close

import xlstm_kernels as xk
from xlstm_kernels.ops.kl_div.op import KL_DIV
from xlstm_kernels.ops.kl_div.options import DIVERGENCES
from xlstm_kernels.ops.topk_kl_div.support import OPEN, SUPPORTS
from xlstm_kernels.testing import Results, check_results

INF, NAN = float("inf"), float("nan")
BACKENDS = ["reference", *(b.value for b, m in KL_DIV.table.items() if hasattr(m, "OVER_RANKS"))]
N, E, K = 7, 12, 9
# Of a float64 row's largest logit the ranks tell each other some 60 octaves, which have 7e-15 left;
# in one process these kernels have no need of them. Seen: 2.0 budgets (reverse).
WIDENED_FLOAT64 = {"cuda": 3.0, "triton": 3.0}
TIMEOUT_S = 900.0  # Triton's interpreter, four at a time
# By function: the tensors that it differentiates by, in its order, then its other arguments.
ARGUMENTS = {
    "kl_div": (("student_logits",), ("teacher_logits",)),
    "topk_kl_div": (("student_logits",), ("topk_logprobs", "topk_ids")),
    "linear_kl_div": (
        ("student_hidden", "student_weight", "student_bias"),
        ("teacher_hidden", "teacher_weight", "teacher_bias"),
    ),
    "linear_topk_kl_div": (
        ("student_hidden", "student_weight", "student_bias"),
        ("topk_logprobs", "topk_ids"),
    ),
    "linear_cross_entropy": (("hidden", "weight", "bias"), ()),
}


@dataclass(frozen=True)
class Case:
    """A call, and how many words each rank has. teacher_more: words of the teacher's last rank
    beyond the student's. corners: rows that are masked in part, or hold NaN."""

    function: str
    widths: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    backend: str = "cpu"
    how: tuple[tuple[str, object], ...] = ()
    labelled: bool = True
    teacher_more: int = 0
    corners: bool = False

    def __str__(self) -> str:
        said = (self.function, self.widths, short(self.dtype), self.backend, dict(self.how))
        return "-".join(map(str, (*said, self.labelled, self.teacher_more, self.corners)))

    @property
    def V(self) -> int:
        return sum(self.widths)


def inputs(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=g, dtype=torch.float64)

    V, teacher_V = case.V, case.V + case.teacher_more
    student = 5 + normal(N, V)
    teacher = torch.cat([student, 5 + normal(N, teacher_V - V)], -1) + normal(N, teacher_V) / 3
    if case.corners:
        first = case.widths[0]
        student[0, :first] = teacher[0, :first] = -INF  # all of one rank
        student[1], teacher[2] = -INF, -INF
        teacher[3, ::3] = -INF
        student[4, -1] = NAN
        student[5] += (
            1e4 if case.dtype != torch.float64 else 10
        )  # of whose digits the oracle has none over
    logprobs, ids = (normal(N, V) + 0.5 * student.nan_to_num(0)).log_softmax(-1).topk(min(K, V - 1))
    ids[1, -2:] = ids[1, 0]
    ids[2, 3:] = -1
    found = {
        "student_logits": student,
        "teacher_logits": teacher,
        "topk_logprobs": logprobs,
        "topk_ids": ids,
    }
    for who, words in (("student_", V), ("teacher_", teacher_V), ("", V)):
        found[f"{who}hidden"], found[f"{who}weight"] = normal(N, E) / 3, normal(words, E) / E**0.5
        found[f"{who}bias"] = normal(words)
    found = {k: v.to(case.dtype) if v.is_floating_point() else v for k, v in found.items()}
    if case.labelled:
        found["labels"] = torch.randint(0, V, (N,), generator=g, dtype=torch.int32)
        found["labels"][0], found["labels"][-2] = dict(case.how).get("ignore_index", -100), V - 1
        found["row_weight"] = torch.rand(N, generator=g, dtype=torch.float64)
        found["row_weight"][-1] = 0
    found["dloss"] = normal(N)
    return found


def part_of(case: Case, tensors: Results, rank: int) -> dict[str, Tensor]:
    """What a rank holds: its columns of logits, and its rows of a head."""
    begin = sum(case.widths[:rank])
    more = case.teacher_more if rank == len(case.widths) - 1 else 0

    def cut(name: str, x: Tensor) -> Tensor:
        words = slice(begin, begin + case.widths[rank] + more * name.startswith("teacher"))
        if name.endswith("logits"):
            return x[:, words]
        return x[words] if name.endswith(("weight", "bias")) and name != "row_weight" else x

    return {name: cut(name, x) for name, x in tensors.items()}


def run(case: Case, tensors: Results, backend: str, **how: object) -> dict[str, Tensor]:
    """The loss and the gradients, also when they are asked for again."""
    mine, others = ARGUMENTS[case.function]
    leaves = {name: tensors[name].detach().requires_grad_() for name in mine}
    how |= dict(case.how) | {"backend": backend, "row_weight": tensors.get("row_weight")}
    names = [name for name in (*mine, *others) if not name.endswith("bias")]
    how |= {name: (leaves | tensors)[name] for name in (*mine, *others) if name not in names}
    how |= {name: leaves[name] for name in mine if name.endswith("bias")}
    arguments = [leaves.get(name, tensors[name]) for name in names]
    loss = getattr(xk, case.function)(*arguments, tensors.get("labels"), **how)
    dloss = tensors["dloss"] if loss.dim() else tensors["dloss"][0]
    found = {"loss": loss.detach()}
    for prefix in ("d_", "again_d_"):
        grads = torch.autograd.grad(
            loss, tuple(leaves.values()), dloss.to(loss.dtype), retain_graph=True
        )
        found |= {f"{prefix}{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def run_cases(rank: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    group = dist.group.WORLD
    return [
        run(case, part_of(case, inputs(case), rank), case.backend, process_group=group)
        for case in cases
    ]


def check_cases(*cases: Case) -> None:
    every = run_on_ranks(len(cases[0].widths), run_cases, list(cases), timeout_s=TIMEOUT_S)
    for case, parts in zip(cases, zip(*every, strict=True), strict=True):
        got = dict(parts[0])
        for name in got:
            every_part = [part[name] for part in parts]
            if name.endswith(("logits", "weight", "bias")):
                got[name] = torch.cat(every_part, dim=-1 if name.endswith("logits") else 0)
            else:  # the same on every rank
                assert all(torch.equal(x.nan_to_num(), got[name].nan_to_num()) for x in every_part)
        tensors = inputs(case)
        exactly = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        exact = run(case, exactly, "reference")
        # Plain torch's, and what one process has of our own: float64 is as exact as the oracle.
        plains = [run(case, tensors, backend) for backend in ("reference", case.backend)]
        for name in got:
            lost = ~exact[name].isfinite()  # an infinite loss has a gradient of inf or NaN
            assert torch.equal(~got[name].isfinite(), lost), f"{case}: {name}"
            for results in (got, exact, *plains):
                results[name] = results[name].masked_fill(lost, 0)
        try:
            widened = WIDENED_FLOAT64.get(case.backend, 1.0) if case.dtype == torch.float64 else 1.0
            check_results(got, exact, iter(plains), widened)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


FUNCTIONS = tuple(ARGUMENTS)
HARD = (("ce_weight", 0.3), ("label_smoothing", 0.1), ("z_loss", 1e-2), ("softcap", 20.0))
WARM = (("temperature", 2.0), *HARD)
CHUNKED = (("chunk_rows", 3),)


def options(function: str, how: tuple[tuple[str, object], ...]) -> tuple[tuple[str, object], ...]:
    """Those that the function has."""
    known = inspect.signature(getattr(xk, function)).parameters
    return tuple((name, value) for name, value in how if name in known)


@pytest.mark.medium
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_two_ranks(backend):
    cases = [Case(f, (33, 20), torch.float32, backend, options(f, WARM)) for f in FUNCTIONS]
    cases += [
        Case("kl_div", (1, 40), torch.float64, backend, (("divergence", "js"),), corners=True),
        Case("topk_kl_div", (3, 40), torch.float32, backend, HARD),
        Case("linear_kl_div", (20, 30), torch.bfloat16, backend, CHUNKED, teacher_more=5),
        Case("linear_kl_div", (30, 20), backend="reference", how=WARM),
    ]
    check_cases(*cases)


HOWS = [
    (("reduction", "none"),),
    (("reduction", "sum"), ("chunk_rows", 2)),
    (("reduction", "batchmean"), ("ignore_index", 3), *HARD),
    (("reduction", "mean"), *WARM),
]
# By backend: the CPU's rows have blocks, of which there are to be several.
WIDTHS = {"cpu": (1, 2050, 30, 5), "cuda": (1, 300, 30, 5), "triton": (1, 50, 30, 5)}


def supported(support: str, divergence: str) -> bool:
    if support == "truncated":
        return divergence == "forward"
    return not (support in OPEN and divergence == "reverse")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*itertools.product(BACKENDS[1:], (torch.float32, torch.bfloat16)),
     ("cpu", torch.float64), ("cpu", torch.float16)],
    ids=short,
)  # fmt: skip
def test_four_ranks(backend, dtype):
    case = partial(Case, widths=WIDTHS[backend], dtype=dtype, backend=backend)
    cases = [case(f, how=options(f, how)) for f in FUNCTIONS for how in HOWS]
    for divergence in DIVERGENCES:
        how = (("divergence", divergence),)
        cases += [
            case(f, how=(*how, *more), labelled=False, teacher_more=more_words)
            for f in ("kl_div", "linear_kl_div")
            for more, more_words in (((), 0), (WARM[:1], 7))
        ]
        cases += [
            case(f, how=(*how, ("support", support), *more))
            for f in ("topk_kl_div", "linear_topk_kl_div")
            for support in SUPPORTS
            for more in ((), WARM)
            if supported(support, divergence)
        ]
    check_cases(*cases)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits_and_nan(backend):
    functions = [f for f in FUNCTIONS if not f.startswith("linear")]
    hows = [(("divergence", d), *more) for d in DIVERGENCES for more in ((), WARM)]
    hows = [(*how, ("reduction", "none")) for how in hows]
    check_cases(
        *(
            Case(f, (31, 20), dtype, backend, how, labelled, corners=True)
            for f, how in itertools.product(functions, hows)
            for dtype in (torch.float64, torch.float32)
            for labelled in (False, True)
            if labelled or "ce_weight" not in dict(how)
        )
    )


@pytest.mark.slow
def test_the_reference_over_ranks():
    """It gathers the columns, and so is no kin of the kernels' phases."""
    check_cases(
        *(
            Case(f, (7, 20), backend="reference", how=options(f, how))
            for f in FUNCTIONS
            for how in HOWS
        )
    )


def write_over(rank: int) -> list[Tensor]:
    """Gradients of logits that may be overwritten, and of strided ones."""
    case = Case("kl_div", (40, 24))
    t = part_of(case, inputs(case), rank)
    found = []
    for student in (t["student_logits"], t["student_logits"].mT.contiguous().mT):
        leaf = student.requires_grad_()
        logits = leaf * 1
        loss = xk.kl_div(
            logits, t["teacher_logits"], inplace_grad=True, process_group=dist.group.WORLD
        )
        loss.backward()
        found.append(leaf.grad)
    return found


@pytest.mark.slow
def test_inplace_grad():
    case = Case("kl_div", (40, 24))
    t = inputs(case)
    leaf = t["student_logits"].requires_grad_()
    xk.kl_div(leaf, t["teacher_logits"]).backward()
    for got in zip(*run_on_ranks(2, write_over), strict=True):
        assert_close(torch.cat(got, -1), leaf.grad)


def disagree(rank: int) -> list[str]:
    """The errors of calls that do not fit together, or not into the group."""
    t = inputs(Case("linear_kl_div", (30, 20), teacher_more=3))
    every, alone = dist.group.WORLD, dist.new_group([0])
    student, teacher = t["student_logits"], t["teacher_logits"]
    head, theirs = (
        (t["student_hidden"], t["student_weight"]),
        (t["teacher_hidden"], t["teacher_weight"]),
    )
    labels = torch.full((N,), 99)
    calls = [
        lambda: xk.kl_div(student[rank:], teacher[rank:], process_group=every),
        lambda: xk.kl_div(student, teacher, temperature=1.0 + rank, process_group=every),
        lambda: xk.kl_div(student, teacher, process_group=every),
        lambda: xk.kl_div(student, student, t["labels"] + 90, ce_weight=1.0, process_group=every),
        lambda: xk.topk_kl_div(
            student, t["topk_logprobs"], t["topk_ids"] + 95, process_group=every
        ),
        lambda: xk.linear_kl_div(
            head[0].requires_grad_(rank == 0), head[1], *theirs, process_group=every
        ),
        lambda: rank and xk.linear_cross_entropy(*head, labels, process_group=alone),
        lambda: xk.kl_div(student, teacher, process_group="world"),
        lambda: torch.compile(xk.kl_div, fullgraph=True, backend="eager")(
            student, student, process_group=every
        ),
    ]
    return [_error(call) for call in calls]


def _error(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


SAME = "must be the same on all ranks of process_group, got "
ERRORS = (
    f"ValueError: kl_div: the number of rows {SAME}[7, 6]",
    f"ValueError: kl_div: a checksum of the options {SAME}[",
    "ValueError: kl_div: student and teacher must have equal parts of the vocabulary on all ranks"
    " of process_group but the last, got [50, 50] and [53, 53] words",
    "ValueError: kl_div: labels must be in [0, 100) or ignore_index = -100, got ",
    "ValueError: topk_kl_div: topk_ids must be in [0, 100) or -1 for none, got ",
    f"ValueError: linear_kl_div: student_hidden.requires_grad {SAME}[1, 0]",
    "RuntimeError: linear_cross_entropy: process_group must hold this rank,"
    " got a group without rank 1",
    "TypeError: kl_div: process_group must be a ProcessGroup, got str",
    "Unsupported: ",
)


@pytest.mark.slow
def test_errors():
    """On both ranks, so that none waits for the other."""
    for rank, errors in enumerate(run_on_ranks(2, disagree, timeout_s=60)):
        for error, text in zip(errors, ERRORS, strict=True):
            outside = text.startswith("RuntimeError")
            assert error.startswith(text) if rank or not outside else error == ""
        assert "torch.compile cannot trace process_group; call it outside" in errors[-1]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [0, N])
def test_one_rank_is_none(one_rank, backend, function, rows):
    case = Case(function, (40,))
    tensors = inputs(case)
    per_row = ("logits", "hidden", "logprobs", "ids", "labels", "row_weight")
    tensors |= {name: x[:rows] for name, x in tensors.items() if name.endswith(per_row)}
    want = run(case, tensors, backend)
    for name, got in run(case, tensors, backend, process_group=one_rank).items():
        assert_close(got, want[name], rtol=1e-12, atol=1e-15)


def test_a_dtensor_is_refused(one_rank):
    logits = DTensor.from_local(torch.randn(3, 5), init_device_mesh("cpu", (1,)), [Replicate()])
    text = (
        r"^kl_div: student_logits must be a plain tensor, got a DTensor; pass this rank's part,"
        r" its to_local\(\)$"
    )
    with pytest.raises(TypeError, match=text):
        xk.kl_div(logits, torch.randn(3, 5), process_group=one_rank)
