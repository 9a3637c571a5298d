"""The recurrence's Triton kernels compiled for chips that this machine need not have, within
budgets: R fits, no register is spilled, and products are on matrix units."""

from __future__ import annotations

from typing import Any

import pytest
from test_mlstm_triton_compile import CHIPS, LENGTHS, check_compiled_once, compiled

from xlstm_kernels.backends import UNAVAILABLE, Backend
from xlstm_kernels.cells import CELLS

pytestmark = [
    pytest.mark.skipif(
        UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
    ),
    pytest.mark.xdist_group("triton_compile"),
]
# bfloat16 of 64 units but for what they say.
CALLS: dict[str, dict[str, Any]] = {
    **{cell: {"cell": cell} for cell in CELLS},
    "packed": {"packed": True, "some": True},
    "odd": {"D": 5},
    "wide": {"D": 128},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "float32-narrow": {"dtype": "float32", "D": 20},
    "float32-wide": {"dtype": "float32", "D": 128},
}
STEPS: list[dict[str, Any]] = [
    {"T": 1, "backward": False, **call}
    for call in (
        *({"cell": cell, "D": 768, "save": False} for cell in CELLS),
        {},
        {"D": 5, "packed": True, "some": True},
        {"D": 1000, "dtype": "float16", "save": False},
        {"D": 1024, "dtype": "float32", "save": False},
    )
]


def check_budgets(chip: str, calls: list[dict[str, Any]], kernels: set[str]) -> None:
    rows = compiled(chip, [{"op": "recurrence", **call} for call in calls])
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= CHIPS[chip][1] * 1024, row
        if "gfx" not in chip and row["flags"].get("HAS_INITIAL", True):
            assert row["mma"], f"no products on matrix units: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_stay_within_the_chip(chip: str, call: str) -> None:
    check_budgets(chip, [CALLS[call]], {"forward_kernel", "backward_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_steps_stay_within_the_chip(chip: str) -> None:
    check_budgets(chip, STEPS, {"step_kernel"})


@pytest.mark.medium
def test_forward_compiles_for_hopper() -> None:
    check_budgets("sm_90", [{"cell": "lstm", "D": 32, "backward": False}], {"forward_kernel"})


@pytest.mark.slow
def test_one_compilation_serves_every_length() -> None:
    """But for forward, of which one saves for a backward and one does not."""
    call = {"op": "recurrence", "cell": "lstm", "D": 16}
    steps = ({"B": B, "T": 1} for B in (1, 2, 3, 16))
    check_compiled_once({**call, "backward": False}, [*LENGTHS, *steps])
    rows = compiled("sm_90", [{**call, **size} for size in LENGTHS])
    assert [row["kernel"] for row in rows].count("backward_kernel") == 1
