"""The mLSTM's Triton kernels compiled for chips that this machine need not have, within budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from xlstm_kernels.backends import UNAVAILABLE, Backend

pytestmark = [
    pytest.mark.skipif(
        UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
    ),
    # Compilers of two workers would take turns.
    pytest.mark.xdist_group("triton_compile"),
]
SCRIPT = Path(__file__).with_name("triton_compile.py")
# Triton's name of the chip, and the shared memory that a block may have there, in KiB.
CHIPS = {
    "sm_80": (["cuda", 80, 32], 163),
    "sm_90": (["cuda", 90, 32], 227),
    "sm_100": (["cuda", 100, 32], 227),
    "sm_120": (["cuda", 120, 32], 99),
    "gfx942": (["hip", "gfx942", 64], 64),
}
# K 128, V 256, bfloat16 but for what they say.
CALLS: dict[str, dict[str, Any]] = {
    "main": {},
    "packed": {"packed": True},
    "walked": {"split": False},
    "sigmoid_none": {"input_gate": "sigmoid", "normalizer": "none"},
    "plain": {"normalizer": "plain"},
    "narrow": {"K": 16, "V": 16},
    "odd": {"K": 80, "V": 24},
    "wide": {"K": 512, "V": 512},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
}
PRODUCTS = {
    "states_kernel",
    "outputs_kernel",
    "queries_kernel",
    "dstates_kernel",
    "keys_kernel",
}
# Bytes a thread (gfx942: registers), where not 0, in one kernel of one or two chips each: ptxas
# stops at 128 registers, where one block more fits a multiprocessor, or has all 255 in use. For so
# few bytes half as wide a block, or no loads ahead in a walk over time, would cost more.
SPILLS = dict.fromkeys(("narrow", "odd", "sigmoid_none", "plain", "float32"), 8) | {"float16": 16}
# Triton 3.6, which torch 2.10 and 2.11 bring along, keeps more of the outputs' walk in registers.
OLD_TRITON_SPILLS = 40

LENGTHS = ({"B": 1, "T": 40}, {"B": 1, "T": 600}, {"B": 3, "T": 601}, {"B": 4, "T": 1024})


def compiled(chip: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    asked = json.dumps({"target": CHIPS[chip][0], "calls": calls})
    run = subprocess.run(
        [sys.executable, str(SCRIPT), asked],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def check_compiled_once(
    call: dict[str, Any], sizes: Iterable[dict[str, int]] = LENGTHS, variants: int = 1
) -> None:
    """Each kernel of `call`, whatever its sizes; `variants`: of each, by flags."""
    kernels = Counter(row["kernel"] for row in compiled("sm_90", [{**call, **s} for s in sizes]))
    assert set(kernels.values()) == {variants}, kernels


def check_budgets(chip: str, call: dict[str, Any], kernels: set[str], spills: int = 0) -> None:
    rows = compiled(chip, [call])
    assert {row["kernel"] for row in rows} >= kernels
    for row in rows:
        assert row["spills"] <= spills, row
        assert row["shared"] <= CHIPS[chip][1] * 1024, row
        if row["kernel"] in PRODUCTS and "dtype" not in call and "gfx" not in chip:
            assert row["async"] or row["flags"]["num_stages"] == 1, f"no asynchronous copies: {row}"
            # A warp group's product has 64 rows.
            if chip == "sm_90" and min(call.get("K", 64), call.get("V", 64)) >= 64:
                assert row["wgmma"], f"no warp group products: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_stay_within_the_chip(chip: str, call: str) -> None:
    old = OLD_TRITON_SPILLS if version("triton").startswith("3.6.") else 0
    check_budgets(chip, CALLS[call], PRODUCTS, max(SPILLS.get(call, 0), old))


@pytest.mark.medium
def test_forward_compiles_for_hopper() -> None:
    check_budgets("sm_90", {"backward": False, "K": 64, "V": 64}, {"states_kernel"})


@pytest.mark.slow
def test_one_compilation_serves_every_length() -> None:
    """With 3 heads gates' strides between sequences are multiples of 16, and a row of numbers by
    token one of 16 bytes, at some lengths alone."""
    for split in (False, True):
        check_compiled_once({"K": 16, "V": 16, "H": 3, "split": split}, LENGTHS[split:])
