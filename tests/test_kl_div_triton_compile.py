"""The losses' Triton kernels, compiled for chips that this machine need not have: registers are not
spilled, and logits move in 16-byte pieces."""

from __future__ import annotations

from typing import Any

import pytest
from test_mlstm_triton_compile import (
    CHIPS,
    check_compiled_once,
    compiled,
    pytestmark,  # noqa: F401
)

HARD = {"ce_weight": 0.5, "temperature": 2.0, "label_smoothing": 0.1, "softcap": 30.0}
HARD |= {"teacher_softcap": 30.0, "z_loss": 1e-4}
# V, dtype, and options: of every family the plain kernel and the largest.
CALLS: dict[str, dict[str, Any]] = {
    "forward": {},
    "float32": {"dtype": "float32"},
    "chunk": {"dtype": "float32", "grad": "bfloat16"},  # of a linear loss
    "reverse": {"divergence": "reverse"},
    "js": {"divergence": "js"},
    "tv": {"divergence": "tv"},
    "hard": HARD,
    "js_hard": {"divergence": "js", **HARD},
    "narrow": {"V": 200},
    "words": {"words": 256},
    "words_chunk": {"words": 256, "dtype": "float32", "grad": "bfloat16"},
    "words_hard": {"words": 256, "divergence": "js", **HARD},
    "split": {"divergence": "js", "split": True},
    "words_split": {"words": 256, "split": True},
    "many_words": {"words": 2048, "support": "both"},
}
CALLS = {
    name: {"op": "kl_div", "V": 128256, "dtype": "bfloat16", **call} for name, call in CALLS.items()
}

# Bytes a thread, where not 0: of words_chunk ptxas stops at 128 registers, where a block more fits.
SPILLS = {"sm_120": 16}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("chip", "names"),
    [
        pytest.param("sm_90", ["js", "words_hard"], id="sm_90-main"),
        *(pytest.param(chip, list(CALLS), marks=pytest.mark.slow, id=chip) for chip in CHIPS),
    ],
)
def test_kernels_stay_within_the_chip(chip: str, names: list[str]) -> None:
    for row in compiled(chip, [CALLS[name] for name in names]):
        assert row["spills"] <= SPILLS.get(chip, 0), row
        assert row["shared"] <= CHIPS[chip][1] * 1024, row
        _, _, columns, _, grad, *_ = row["flags"]["HOW"]
        if "gfx" not in chip and columns > 1000:  # narrow rows of any width begin anywhere
            assert row["wide_ld"] and (row["wide_st"] or not grad), row


@pytest.mark.slow
@pytest.mark.parametrize("words", [0, 16])
def test_one_compilation_serves_every_number_of_rows(words: int) -> None:
    check_compiled_once({"op": "kl_div", "V": 50257, "dtype": "bfloat16", "words": words})
