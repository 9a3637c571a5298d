"""Sliding-window attention's Triton kernels compiled for chips that this machine need not have."""

from __future__ import annotations

from typing import Any

import pytest
from test_mlstm_triton_compile import CHIPS, LENGTHS, check_compiled_once, compiled

from xlstm_kernels.backends import UNAVAILABLE, Backend

pytestmark = [
    pytest.mark.skipif(
        UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
    ),
    pytest.mark.xdist_group("triton_compile"),
]
# D and E 128, bfloat16 but for what they say.
CALLS: dict[str, dict[str, Any]] = {
    "main": {},
    "narrow": {"D": 64, "E": 64},
    "packed": {"packed": True, "D": 80, "E": 24},
    "no_sinks": {"sinks": 0, "G": 4},
    "wide": {"D": 256, "E": 256},
    "float32": {"dtype": "float32", "D": 64, "E": 64},
    "wide_float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
}
# Bytes a thread, where not 0: ptxas stops at 128 or 168 registers, where one more block fits, for
# one or two; heads of 128 in float32 do without matrix units and are here to be right, not fast.
SPILLS = {"main": 8, "narrow": 8, "no_sinks": 8, "wide": 24, "float16": 8, "wide_float32": 208}
# Registers, of gfx942's 256: its threads are half as many as products have rows.
HIP_SPILLS = {"main": 29, "packed": 1, "no_sinks": 22, "wide": 103}
KERNELS = {"forward_kernel", "queries_kernel", "keys_kernel", "sinks_kernel"}


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param("sm_90", "main", marks=pytest.mark.medium, id="sm_90-medium"),
        *(
            pytest.param(chip, name, marks=pytest.mark.slow, id=f"{chip}-{name}")
            for chip in CHIPS
            for name in CALLS
        ),
    ],
)
def test_kernels_stay_within_the_chip(chip: str, name: str) -> None:
    call = CALLS[name]
    rows = compiled(chip, [{"op": "attention", **call}])
    wanted = KERNELS - ({"sinks_kernel"} if call.get("sinks") == 0 else set())
    assert {row["kernel"] for row in rows} == wanted
    spills = HIP_SPILLS if "gfx" in chip else SPILLS
    for row in rows:
        assert row["spills"] <= spills.get(name, 0), row
        assert row["shared"] <= CHIPS[chip][1] * 1024, row
        if "dtype" not in call and "gfx" not in chip:
            assert row["async"] or name == "wide", f"no asynchronous copies: {row}"
            if chip == "sm_90" and name != "wide":
                assert row["wgmma"], f"no warp group products: {row}"


@pytest.mark.slow
def test_one_compilation_serves_every_length() -> None:
    """Longer than the window: where that holds all, no first token lies before one."""
    check_compiled_once({"op": "attention", "D": 16, "E": 16}, LENGTHS[1:])
