"""The lists that the recurrence's tests iterate."""

import pytest
import torch

from xlstm_kernels.backends import TRITON_INTERPRETED, Backend
from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.recurrence import op
from xlstm_kernels.ops.recurrence.op import RECURRENCE
from xlstm_kernels.testing import RecurrenceCase, recurrence_inputs

# All of them: conftest.py skips those that cannot run here, with the reason.
BACKENDS = [backend.value for backend in RECURRENCE.table]
# In Triton's interpreter a step of a head takes 40 ms. What tests/test_recurrence_triton.py has is
# fast; what takes more steps than these tells no more, and is left out.
SLOW = {"triton"} if TRITON_INTERPRETED else set()
MOST_STEPS = 100
ON_CPU = pytest.mark.skipif(not TRITON_INTERPRETED, reason="triton: tensors are on the CPU")
EACH_BACKEND = [
    pytest.param(b, marks=[pytest.mark.slow, ON_CPU] if b == "triton" else []) for b in BACKENDS
]
# What hypothesis draws would take minutes there.
SWIFT_BACKENDS = [backend for backend in BACKENDS if backend != "triton"]
FLOAT64 = {"reference", "cpu"}
SLSTM_CELLS = [cell for cell in CELLS if CELLS[cell].function == "slstm"]


def on_every_backend(*variants: dict, cells=CELLS, backends=BACKENDS) -> list:
    """pytest parameters: each variant for each cell and backend; skipped, with its reason, where a
    backend refuses the call."""
    cases = [RecurrenceCase(c, b, **v) for v in variants for c in cells for b in backends]
    cases = [c for c in cases if c.backend not in SLOW or c.T * c.H * (c.B // 9 + 1) <= MOST_STEPS]
    return [pytest.param(case, id=str(case), marks=_marks(case)) for case in cases]


def _marks(case: RecurrenceCase) -> list:
    slow = [pytest.mark.slow] if case.backend in SLOW else []
    if case.backend == "reference":
        return slow
    x_BTGHD = torch.empty(1, 1, 4, 1, case.D, dtype=case.dtype)
    r_GHDE = torch.empty(4, 1, case.D, case.D, dtype=case.weight_dtype or case.dtype)
    why = RECURRENCE.table[Backend(case.backend)].supports(x_BTGHD, r_GHDE, case.cell)
    refused = [] if why is None else [pytest.mark.skip(reason=f"backend {case.backend!r}: {why}")]
    return slow + refused


def check_replayed(case: RecurrenceCase) -> None:
    """Raises AssertionError unless a CUDA graph, captured on a stream of its own, gives the bits of
    a call when it is replayed on other inputs, and again."""
    inputs = {name: t.cuda() for name, t in recurrence_inputs(case).items()}
    want = all_results(case, inputs)
    given = {name: torch.zeros_like(t) for name, t in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        got = all_results(case, given)
    for name, t in inputs.items():
        given[name].copy_(t)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for result, expected in zip(got, want, strict=True):
            assert torch.equal(result, expected)


def all_results(case: RecurrenceCase, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of both passes; of one step, those of forward, which saves nothing then."""
    x, r, save = inputs["x"], inputs["r"], case.T > 1
    state = torch.stack([inputs[f"{field}0"] for field in CELLS[case.cell].State._fields])
    rest = (None, case.cell, case.n_floor)
    h, last, *saved = op.forward(x, r, inputs["b"], state, *rest, save, case.backend)
    if not save:
        return [h, last]
    asked = (case.clip_grad, x.new_empty(0), [True] * 3, case.backend)
    return [h, last, *saved, *op.backward(h, last, r, *saved, *rest, *asked)]
