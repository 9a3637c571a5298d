"""The lists that the recurrence's tests iterate."""

import pytest
import torch

from xlstm_kernels.backends import Backend
from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.recurrence.op import RECURRENCE
from xlstm_kernels.testing import RecurrenceCase

# All of them: conftest.py skips those that cannot run here, with the reason.
BACKENDS = [backend.value for backend in RECURRENCE.table]
SLSTM_CELLS = [cell for cell in CELLS if CELLS[cell].function == "slstm"]


def on_every_backend(*variants: dict, cells=CELLS, backends=BACKENDS) -> list:
    """pytest parameters: each variant for each cell and backend; skipped, with its reason, where a
    backend refuses the call."""
    cases = [RecurrenceCase(c, b, **v) for v in variants for c in cells for b in backends]
    return [pytest.param(case, id=str(case), marks=_refused(case)) for case in cases]


def _refused(case: RecurrenceCase) -> tuple:
    if case.backend == "reference":
        return ()
    x_BTGHD = torch.empty(1, 1, 4, 1, case.D, dtype=case.dtype)
    r_GHDE = torch.empty(4, 1, case.D, case.D, dtype=case.weight_dtype or case.dtype)
    why = RECURRENCE.table[Backend(case.backend)].supports(x_BTGHD, r_GHDE, case.cell)
    return () if why is None else pytest.mark.skip(reason=f"backend {case.backend!r}: {why}")
