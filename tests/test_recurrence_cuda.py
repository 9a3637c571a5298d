"""The CUDA kernels of the recurrence: each launch shape, what they refuse, what nvcc made of them,
and on a device streams and graphs. The operation's other tests run them on the emulator too."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recurrence_cases import on_every_backend

import xlstm_kernels as xk
from xlstm_kernels.backends import CUDA_EMULATOR, load_cuda
from xlstm_kernels.cells import CELLS
from xlstm_kernels.memory import CPU_DTYPES
from xlstm_kernels.ops.recurrence import cuda, op
from xlstm_kernels.testing import (
    RecurrenceCase,
    check_recurrence,
    check_results,
    recurrence_inputs,
    relative_error,
    run_recurrence,
)

CUDA_EXTENSION = importlib.util.find_spec("xlstm_kernels._cuda")
TRITON = importlib.util.find_spec("triton")
# Triton brings one where CUDA's own tools are not on PATH.
CUOBJDUMP = shutil.which("cuobjdump") or (
    TRITON
    and TRITON.origin
    and shutil.which("cuobjdump", path=str(Path(TRITON.origin).parent / "backends/nvidia/bin"))
)
emulated = pytest.mark.skipif(
    CUDA_EMULATOR is None, reason="the emulator is built by `make emulated`"
)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(CUDA_EXTENSION is None, reason="xlstm_kernels._cuda is not built"),
]
# A head of each launch shape, with units to spare, in two tiles of sequences.
EVERY_SHAPE = [
    {"B": 9, "T": 18, "H": 2, "D": D, "dtype": dtype}
    for D in (20, 56, 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("case", on_every_backend(*EVERY_SHAPE, backends=["cuda"]))
def test_every_launch_shape(case):
    check_recurrence(case)


@emulated
def test_widths_are_those_of_the_kernels():
    """What `supports` promises of shared memory is what launches take."""
    found: dict[torch.dtype, dict[int, int]] = {}
    for shape in load_cuda(emulated=True).recurrence_launch_shapes():
        widths = found.setdefault(CPU_DTYPES[shape["operand"]], {})
        widths[shape["D"]] = max(widths.get(shape["D"], 0), shape["shared_bytes"])
    assert found == cuda.SHARED_BYTES


@emulated
@pytest.mark.parametrize(
    ("D", "dtype", "text"),
    [
        (129, torch.float32, "R of a head must fit one block: D at most 128"),
        (2, torch.float64, "x must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_is_refused_has_a_reason(D, dtype, text):
    x, r = torch.zeros(1, 3, 4, 1, D, dtype=dtype), torch.zeros(4, 1, D, D, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"^lstm: backend 'cuda' cannot run .*: {text}$"):
        xk.lstm(x, r, backend="cuda")
    xk.lstm(x, r)


@pytest.mark.parametrize("case", on_every_backend({"T": 35, "B": 9}, backends=["cuda"]))
def test_forward_and_backward_on_different_backends(case):
    """What forward saves is the operation's: the other backend's backward gives the same."""
    inputs = recurrence_inputs(case)
    state = torch.stack([inputs[f"{f}0"] for f in CELLS[case.cell].State._fields])
    call = (inputs["x"], inputs["r"], inputs["b"], state, None, case.cell, 0.0, True)
    grads = {}
    for forward in ("cpu", "cuda"):
        h, last, raw, checkpoints = op.forward(*call, forward)
        for backward in ("cpu", "cuda"):
            given = (h, last, inputs["r"], raw, checkpoints, None, case.cell, 0.0, None)
            grads[forward, backward] = op.backward(
                *given, inputs["x"].new_empty(0), [True] * 3, backward
            )
    for pair, got in grads.items():
        for part, want in zip(got, grads["cpu", "cpu"], strict=True):
            assert relative_error(part, want) < 1e-5, pair


@pytest.mark.skipif(CUDA_EXTENSION is None, reason="xlstm_kernels._cuda is not built: no nvcc")
@pytest.mark.skipif(not CUOBJDUMP, reason="there is no cuobjdump on PATH, nor Triton's")
def test_kernels_hardly_spill_registers():
    """A spill is a stack frame: no array here would need one. nvcc 13.0 leaves 8 to 24
    bytes in the kernels that fill the register file, however many fragments they hold."""
    assert CUDA_EXTENSION is not None and CUDA_EXTENSION.origin is not None
    usage = subprocess.run(
        [str(CUOBJDUMP), "-res-usage", CUDA_EXTENSION.origin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"Function (\S*recurrence\w+):\s+(REG.*)", usage)
    archs = len(load_cuda().archs())
    # nvcc 13.0 moves more of this one's loads ahead for sm_100 than its registers hold: 150 to 190
    # bytes a thread.
    excused = re.findall(r"\S*recurrence_forward_kernel\S*Li2ELi128\w+", usage)
    shapes = 2 * sum(map(len, cuda.SHARED_BYTES.values()))
    assert len(found) == archs * shapes * len(CELLS)
    frames = {name: int(re.findall(r"STACK:(\d+)", use)[0]) for name, use in found}
    spilled = [f"{n}: {size} bytes" for n, size in frames.items() if size > 32 and n not in excused]
    assert not spilled, "\n".join(spilled)


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=gpu) for cell in CELLS])
@pytest.mark.parametrize("variant", EVERY_SHAPE, ids=str)
def test_on_a_device(cell, variant):
    case = RecurrenceCase(cell, "cuda", **variant | {"T": 65})
    inputs = recurrence_inputs(case)
    got = run_recurrence(case, {name: t.cuda() for name, t in inputs.items()}, "cuda")
    exact = {name: t.double() for name, t in inputs.items()}
    check_results(
        {name: t.cpu() for name, t in got.items()},
        run_recurrence(replace(case, dtype=torch.float64), exact, "reference"),
        iter([run_recurrence(case, inputs, "reference")]),
        1.5,
        None if case.dtype is torch.float32 else torch.float16,
    )


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=gpu) for cell in CELLS])
def test_captured_in_a_graph_on_its_own_stream(cell):
    case = RecurrenceCase(cell, "cuda", B=3, T=20, H=2, D=64, state="zero", bias=False)
    inputs = {name: t.cuda() for name, t in recurrence_inputs(case).items()}
    function = getattr(xk, CELLS[cell].function)
    want, _ = function(inputs["x"], inputs["r"], backend="cuda")
    x = torch.zeros_like(inputs["x"])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        h, _ = function(x, inputs["r"], backend="cuda")
    x.copy_(inputs["x"])
    graph.replay()
    torch.cuda.synchronize()
    if CELLS[cell].function == cell:
        assert torch.equal(h, want)
