"""The step's Triton kernel, compiled for chips that this machine need not have: no register is
spilled, and the state moves in 16-byte pieces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_kernels.backends import UNAVAILABLE, Backend

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
# Its shared memory is for sums across warps alone.
SHARED_BYTES = 8 << 10
# A process of its own: Triton's interpreter, once on, compiles nothing.
PROGRAM = """
import json, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from xlstm_kernels.ops.mlstm_step import triton as step

*target, calls = json.loads(sys.argv[1])
target = GPUTarget(*target)

class Driver:
    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def spills(asm):
    if target.backend == "hip":
        return int(re.search(r"\\.vgpr_spill_count:\\s*(\\d+)", asm["amdgcn"]).group(1))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return sum(int(re.search(rf"{name}:(\\d+)", text).group(1)) for name in ("STACK", "LOCAL"))

def compile_only(kernel, *args, warmup, **options):
    binary = launch(kernel, *args, warmup=True, **options)
    ptx = binary.asm.get("ptx", "")
    wide = [len(re.findall(rf"{way}\\.global\\S*\\.v4", ptx)) for way in ("ld", "st")]
    rows.append({"spills": spills(binary.asm), "shared": binary.metadata.shared, "wide": wide,
                 "memory": options["MEMORY"]})

driver.set_active(Driver())
launch, JITFunction.run, rows = JITFunction.run, compile_only, []
for dtype, c_dtype, K, V, T, how in calls:
    q, k, v = (torch.zeros(2, T, 1, D, dtype=getattr(torch, dtype)) for D in (K, K, V))
    i, f = torch.zeros(2, T, 1), torch.zeros(2, T, 1)
    c = torch.zeros(40, 1, K, V, dtype=getattr(torch, c_dtype))
    call = (q, k, v, i, f, c, torch.zeros(40, 1, K), torch.zeros(40, 1))
    index, options = torch.arange(2), ("exp", "max", 1.0, 1e-6)
    if how == "all":
        step.forward(*call, index, True, *options)
    else:
        save = torch.arange(2, 2 + 2 * T).view(2, T) if how == "save" else None
        step.update(*call, torch.zeros_like(v), index, save, *options)
print(json.dumps(rows))
"""
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


@pytest.mark.parametrize(
    ("chip", "calls"),
    [
        pytest.param("sm_90", MAIN, id="sm_90-main"),
        *(pytest.param(chip, MAIN + OTHERS, marks=pytest.mark.slow, id=chip) for chip in CHIPS),
    ],
)
def test_kernels_fit(chip, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*CHIPS[chip], calls])],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert rows.returncode == 0, rows.stderr
    for row in json.loads(rows.stdout):
        assert row["spills"] == 0 and row["shared"] <= SHARED_BYTES, row
        if row["memory"] and chip != "gfx942":
            assert min(row["wide"]) > 0, row
