"""The losses' Triton kernels in small: every branch of them, fast enough to run while one works."""

from __future__ import annotations

import pytest
import torch
from kl_div_cases import Case, check_case
from topk_cases import KINDS, check_topk

import xlstm_kernels as xk
from xlstm_kernels.backends import TRITON_INTERPRETED, UNAVAILABLE, Backend
from xlstm_kernels.ops.kl_div import triton_launch
from xlstm_kernels.ops.kl_div.options import DIVERGENCES
from xlstm_kernels.ops.topk_kl_div import triton as topk

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
ON_CPU = pytest.mark.skipif(not TRITON_INTERPRETED, reason="its tensors are on the CPU")
HARD = {"ce_weight": 0.3, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 9.0}
VARIANTS = [
    *({"divergence": name} for name in DIVERGENCES),
    *({"divergence": name, "temperature": 2.0, **HARD} for name in ("reverse", "js", "tv")),
    {**HARD, "teacher_softcap": 5.0, "reduction": "mean", "weighted": True},
    {"dtype": torch.float64, "temperature": 3.0, **HARD},
    {"dtype": torch.bfloat16, "teacher_dtype": torch.float16},
    {"dtype": torch.float16, "divergence": "skew", "beta": 0.1, "apart": 30.0},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs, and several blocks of a row."""
    small = triton_launch.Blocks(4, 64, 4)
    monkeypatch.setattr(triton_launch, "INTERPRETED", small)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_small_cases(variant):
    check_case(Case("triton", V=150, N=6, **variant))


@pytest.mark.parametrize("kind", [k for k in KINDS if "forward" in k or "tail" in k], ids="-".join)
def test_small_cases_of_few_words(kind):
    check_topk("triton", kind, 150, 20, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [("tail", "forward"), ("both", "js")], ids="-".join)
def test_few_words_with_hard_labels(kind, dtype):
    check_topk("triton", kind, 150, 20, dtype, temperature=2.0, **HARD)


@ON_CPU
def test_what_a_gpu_does_not_look_at(monkeypatch):
    """Where values are not read back, a label or a word out of range makes its row NaN."""
    monkeypatch.setattr(triton_launch, "valid_rows", lambda *call: None)
    monkeypatch.setattr(topk, "check_ids", lambda *call: None)
    student, teacher = torch.randn(3, 150), torch.randn(3, 150)
    labels = torch.tensor([0, 150, -100])
    how = {"ce_weight": 0.5, "reduction": "none", "backend": "triton"}
    loss = xk.kl_div(student, teacher, labels, **how)
    assert loss.isnan().tolist() == [False, True, False]
    logprobs, ids = teacher.log_softmax(-1).topk(4)
    ids[0, 2], ids[2, 1] = -2, 150
    loss = xk.topk_kl_div(student, logprobs, ids, backend="triton", reduction="none")
    assert loss.isnan().tolist() == [True, False, True]


@ON_CPU
def test_many_words_are_refused():
    why = topk.supports(torch.zeros(1, 9), torch.zeros(1, 5000))
    assert why == "topk_logprobs must be (..., K), K at most 2048, got 5000"
