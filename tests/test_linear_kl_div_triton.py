"""The linear losses on triton in small, and what only a GPU does: nothing is read back."""

from __future__ import annotations

import pytest
import torch
from linear_cases import FUNCTIONS, HEAD, Case, check_case, inputs
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import xlstm_kernels as xk
from xlstm_kernels.backends import TRITON_INTERPRETED, UNAVAILABLE, Backend
from xlstm_kernels.ops.kl_div import triton_launch
from xlstm_kernels.ops.linear_kl_div import chunks, plan
from xlstm_kernels.ops.linear_kl_div.inputs import Inputs
from xlstm_kernels.ops.topk_kl_div import triton as topk

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
ON_CPU = pytest.mark.skipif(not TRITON_INTERPRETED, reason="its tensors are on the CPU")
VARIANTS = [
    {"weighted": True, "ce_weight": 0.4, "bias": True},
    {"dtype": torch.bfloat16, "weighted": True},
    {"dtype": torch.bfloat16, "E": 4, "bias": True, "reduction": "none"},
    {"dtype": torch.bfloat16, "E": 4, "reduction": "sum"},
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_small_cases(function, variant):
    check_case(Case("triton", function, N=6, V=90, chunk_rows=8, **variant))


class NothingIsReadBack(TorchDispatchMode):
    """Raises where the host would wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select")
        assert not str(function).startswith(waits), function
        return function(*args, **(kwargs or {}))


@ON_CPU
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_read_back(function, monkeypatch):
    """A label out of range makes its row NaN, and NaN in a row that does not count stays there."""
    looks = chunks.valid_rows
    monkeypatch.setattr(chunks, "valid_rows", lambda *call: looks(*call[:2], look=False))
    monkeypatch.setattr(triton_launch, "valid_rows", lambda *call: None)
    monkeypatch.setattr(topk, "check_ids", lambda *call: None)
    t = inputs(Case("triton", function, N=4, V=90, ce_weight=0.4, weighted=True))
    t["hidden"][0, 0] = torch.nan  # its label is ignored
    names = {"linear_kl_div": ("teacher_hidden", "teacher_weight"), FUNCTIONS[2]: ()}
    target = [t[name] for name in names.get(function, ("topk_logprobs", "topk_ids"))]
    head = [t[name].requires_grad_() for name in HEAD[:2]]
    how = {"row_weight": t["row_weight"], "chunk_rows": 3, "backend": "triton"}
    if target:
        how["ce_weight"] = 0.4
    with NothingIsReadBack():
        loss = getattr(xk, function)(*head, *target, t["labels"], **how)
        grads = torch.autograd.grad(loss, head)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0, 0] == 0).all()
    t["labels"][1, 1] = 90
    rows = getattr(xk, function)(*head, *target, t["labels"], reduction="none", **how)
    assert rows.isnan().nonzero().tolist() == [[1, 1]]


def test_chunks_for_a_gpu_are_larger():
    """8192 rows of E = 4096, V = 128256: products of 1024 rows; many more rows, more of them."""
    for N, rows in ((8192, 1024), (2**17, 4096)):
        student, teacher = (
            [torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (N, 128256)]
            for _ in range(2)
        )
        given = Inputs(*student, None, *teacher, *(None,) * 6)
        how = [True, True, False], torch.bfloat16, None
        assert plan.plan_rows(N, given, *how, host=False) == rows
        assert plan.plan_rows(N, given, *how, host=True) <= 512


def test_chunks_are_about_as_large():
    """Room is for 320 rows: 1024 are four times 256, not three of 320 and one of 64."""
    student, teacher = (
        [torch.empty(n, 1024, device="meta") for n in (1024, 32000)] for _ in range(2)
    )
    given = Inputs(*student, None, *teacher, *(None,) * 6)
    how = given, [True, True, False], torch.float32, None
    assert [plan.plan_rows(N, *how, host=True) for N in (320, 1024, 0)] == [320, 256, 0]


@ON_CPU
def test_what_it_cannot_run():
    x, w = torch.zeros(2, 3), torch.zeros(9000, 3)
    words = torch.zeros(2, 5000), torch.zeros(2, 5000, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"\(\.\.\., K\), K at most 2048, got 5000"):
        xk.linear_topk_kl_div(x, w, *words, backend="triton")
    got = xk.linear_topk_kl_div(x, w, *words)  # on another backend
    assert_close(got, xk.linear_topk_kl_div(x, w, *words, backend="reference"))
