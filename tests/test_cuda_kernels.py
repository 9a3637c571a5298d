"""What nvcc made of the CUDA kernels, within budgets: nothing spilled, products on tensor cores."""

from __future__ import annotations

import cuda_kernels
import pytest

from xlstm_kernels.backends import load_cuda
from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.recurrence.launch import BLOCK_BYTES

compiled = pytest.mark.skipif(bool(why := cuda_kernels.missing()), reason=why or "")


@compiled
def test_every_kernel_is_there_for_every_architecture() -> None:
    found = cuda_kernels.resources()
    archs = [f"sm_{arch}" for arch in load_cuda().archs()]
    for arch in archs:
        kernels = [k for k in found if k.arch == arch]
        shapes = sum(map(len, BLOCK_BYTES.values()))
        here = [k.name for k in kernels]
        assert here.count("recurrence_step") == 3 * len(CELLS), arch  # dtypes of r
        for direction in ("forward", "backward"):
            assert here.count(f"recurrence_{direction}") == shapes * len(CELLS), arch
            teams = 2 * len(BLOCK_BYTES) * len(CELLS)  # clusters and others
            assert here.count(f"recurrence_team_{direction}") == teams, arch


@compiled
def test_kernels_spill_no_registers() -> None:
    """A spill is a stack frame: no array here would need one."""
    spilled = [f"{k}: {k.stack_bytes} bytes" for k in cuda_kernels.resources() if k.stack_bytes]
    assert not spilled, "\n".join(spilled)


@compiled
def test_what_is_launched_fits_a_multiprocessor() -> None:
    header, rows = cuda_kernels.predictions(cuda_kernels.resources())
    fits = header.index("blocks an SM")
    assert rows and all(int(str(row[fits])) >= 1 for row in rows)


@compiled
@pytest.mark.slow
def test_products_are_on_tensor_cores_and_teams_meet_as_they_are_to() -> None:
    """But for one step, which reads R once; sm_80 has no clusters."""
    found = [k for k in cuda_kernels.kernels() if k.name.startswith("recurrence_")]
    assert found
    wrong = [f"{k}: {k.counts}" for k in found if k.counts["spills"]]
    for kernel in found:
        team, cluster = "team" in kernel.name, kernel.template.endswith("true")
        if "step" in kernel.name or (cluster and kernel.arch == "sm_80"):
            expected = dict.fromkeys(("mma", "prefetch", "async", "acquire"), False)
        else:
            expected = {"mma": True, "prefetch": True}
            expected |= {"async": cluster, "acquire": team and not cluster}
        if any(bool(kernel.counts[what]) != there for what, there in expected.items()):
            wrong.append(f"{kernel}: {kernel.counts}")
    assert not wrong, "\n".join(wrong)
