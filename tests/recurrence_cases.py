"""The lists that the recurrence's tests iterate."""

import pytest

from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.recurrence.op import RECURRENCE
from xlstm_kernels.testing import RecurrenceCase

# All of them: conftest.py skips those that cannot run here, with the reason.
BACKENDS = [backend.value for backend in RECURRENCE.table]
SLSTM_CELLS = [cell for cell in CELLS if CELLS[cell].function == "slstm"]


def on_every_backend(*variants: dict, cells=CELLS, backends=BACKENDS) -> list:
    """pytest parameters: each variant for each cell and backend."""
    cases = [RecurrenceCase(c, b, **v) for v in variants for c in cells for b in backends]
    return [pytest.param(case, id=str(case)) for case in cases]
