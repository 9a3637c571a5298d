"""The step's Triton kernel, compiled for chips that this machine need not have: no register is
spilled, and the state moves in 16-byte pieces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_mlstm_triton_compile import check_compiled_once

from xlstm_kernels.backends import UNAVAILABLE, Backend

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
# Its shared memory is for sums across warps alone.
SHARED_BYTES = 8 << 10
# dtype, dtype of c, K, V, T, which states are kept
MAIN = [
    ("bfloat16", "float32", 256, 512, 1, "last"),
    ("bfloat16", "bfloat16", 256, 512, 4, "save"),
]
OTHERS = [
    ("float32", "float32", 256, 512, 4, "all"),
    ("float32", "float32", 512, 512, 4, "save"),
    ("bfloat16", "bfloat16", 512, 512, 4, "all"),
    ("float16", "float32", 128, 256, 1, "last"),
    ("float16", "float32", 96, 80, 4, "save"),
    ("float32", "float32", 16, 16, 1, "last"),
]
CHIPS = {
    "sm_90": ("cuda", 90, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("chip", "calls"),
    [
        pytest.param("sm_90", MAIN, id="sm_90-main"),
        *(pytest.param(chip, MAIN + OTHERS, marks=pytest.mark.slow, id=chip) for chip in CHIPS),
    ],
)
def test_kernels_fit(chip, calls, monkeypatch, tmp_path):
    named = [dict(zip(("dtype", "c_dtype", "K", "V", "T", "kept"), c, strict=True)) for c in calls]
    asked = {"target": CHIPS[chip], "calls": [{"op": "mlstm_step", **call} for call in named]}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # the sanitizers', which no kernel needs here
    rows = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_compile.py"), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert rows.returncode == 0, rows.stderr
    for row in json.loads(rows.stdout):
        assert row["spills"] == 0 and row["shared"] <= SHARED_BYTES, row
        if row["flags"]["MEMORY"] and chip != "gfx942":
            assert row["wide_ld"] and row["wide_st"], row


@pytest.mark.medium
def test_one_compilation_serves_every_length():
    """Two launches: c and h, then n and m."""
    call = {"op": "mlstm_step", "dtype": "bfloat16", "c_dtype": "float32", "K": 16, "V": 16, "H": 2}
    sizes = [{"B": B, "T": T} for B, T in ((1, 1), (1, 4), (2, 3), (2, 16), (16, 1))]
    check_compiled_once({**call, "kept": "save"}, sizes, variants=2)
