"""Every cell on every backend gives the float64 reference's outputs and gradients."""

import pytest
import torch
from recurrence_cases import BACKENDS, SLSTM_CELLS, on_every_backend

from xlstm_kernels.cells import CELLS
from xlstm_kernels.testing import (
    call_recurrence,
    check_recurrence,
    recurrence_inputs,
    run_recurrence,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    *({"T": T} for T in (0, 1, 2, 15, 16, 17, 63, 64, 65, 257)),
    *({"D": D} for D in (1, 3, 8, 20, 48, 64, 80)),
    *({"B": B, "H": 1, "D": 8} for B in (1, 2, 5, 7, 13, 33)),
    {"B": 0},
    {"B": 2, "T": 5, "D": 160},
    {"B": 1, "T": 1, "H": 4, "D": 64},
    {"B": 9, "T": 63, "H": 3, "D": 24},
]
# r and b in float32, or in x's dtype.
DTYPE_VARIANTS = [
    {"T": 35, "dtype": dtype, "weight_dtype": weight_dtype}
    for dtype in DTYPES
    for weight_dtype in (None, torch.float32)
    if weight_dtype is not dtype
]
LAYOUTS = [
    {"layout": layout, "dtype": dtype}
    for layout in ("head_first", "expanded", "strided")
    for dtype in (torch.float32, torch.bfloat16)
]
STATES = [{"state": state, "dtype": d} for state in ("zero", "large") for d in DTYPES[:3]]
GATES = [
    {"gates": gates, "state": state, "T": 40, "dtype": dtype}
    for gates in (50.0, 100.0)
    for state in ("zero", "random")
    for dtype in (torch.float32, torch.bfloat16)
]
# n = 0 but c != 0, where the forget gate's exponent has no bound but 80; one step, since the next
# would multiply states of 1e34 into its gates.
EMPTY_STATES = [{"state": "empty", "T": 1, "gates": gates} for gates in (None, 30.0, 50.0)]
LENGTHS = [
    {"lengths": lengths, "bias": bias}
    for lengths, bias in (
        ((7, 16, 1), True),
        ((0, 5, 0, 33, 17, 0), True),
        ((48,), False),
        ((0, 0), True),
        ((), True),
        ((3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3), True),
    )
]
OPTIONS = [{"bias": False}, {"bias": False, "state": "zero", "T": 1}]
SLSTM_OPTIONS = [
    {"n_floor": 1.0},
    {"n_floor": 1.0, "state": "zero"},
    {"clip_grad": 0.05},
    {"clip_grad": 0.05, "T": 40, "lengths": (17, 0, 23)},
    *({"state": "empty", "n_floor": n_floor} for n_floor in (0.0, 1.0)),
]


@pytest.mark.parametrize("case", on_every_backend(*SHAPES))
def test_shapes(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*DTYPE_VARIANTS))
def test_dtypes(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*LAYOUTS))
def test_layouts(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*STATES))
def test_initial_states(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*GATES))
def test_saturated_gates(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*LENGTHS))
def test_packed_sequences(case):
    check_recurrence(case)


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        {"H": 11, "D": 5}, {"lengths": (0, 5, 0, 33), "H": 11, "D": 5}, backends=["cpu"]
    ),
)
def test_heads_side_by_side(case, threads):
    """On two threads a task of six heads and one of five."""
    threads(2)
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*OPTIONS))
def test_absent_arguments(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*SLSTM_OPTIONS, cells=SLSTM_CELLS))
def test_slstm_options(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend(*EMPTY_STATES, cells=SLSTM_CELLS))
def test_empty_states(case):
    check_recurrence(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    on_every_backend(
        {"B": 16, "T": 80, "H": 4, "D": 64},
        {"B": 5, "T": 33, "H": 1, "D": 320},
        {"B": 2, "T": 1000, "H": 2, "D": 16},
    ),
)
def test_larger_shapes(case):
    check_recurrence(case)


@pytest.mark.parametrize("case", on_every_backend({"T": 33}, {"lengths": (5, 0, 20)}))
def test_gradient_through_some_outputs(case):
    """A loss on c, n or m alone is what peers get wrong: they hold m constant."""
    states = [f"last_{field}" for field in CELLS[case.cell].State._fields]
    for through in (["h"], states, *([state] for state in states)):
        check_recurrence(case, through)


@pytest.mark.parametrize("case", on_every_backend({"T": 19}, {"T": 19, "state": "zero"}))
def test_gradient_of_some_inputs(case):
    """Whatever else is asked for, each gradient has the same bits."""
    inputs = recurrence_inputs(case)
    everything = run_recurrence(case, inputs, case.backend)
    names = [name for name in inputs if not name.startswith("weight_")]
    for wanted in (*([name] for name in names), names[:2], names[2:]):
        some = run_recurrence(case, inputs, case.backend, wanted=wanted)
        for name in wanted:
            assert torch.equal(some[f"d_{name}"], everything[f"d_{name}"]), name


GRADCHECK = [
    {"dtype": torch.float64, "B": 2, "T": 3, "H": 2, "D": 3},
    {"dtype": torch.float64, "lengths": (2, 0, 3), "H": 1, "D": 3},
    {"dtype": torch.float64, "B": 1, "T": 18, "H": 1, "D": 2},
]


@pytest.mark.parametrize("case", on_every_backend(*GRADCHECK, backends=["reference", *BACKENDS]))
def test_gradcheck(case):
    inputs = recurrence_inputs(case)
    names = [name for name in inputs if not name.startswith("weight_")]

    def outputs(*tensors):
        h, last = call_recurrence(case, dict(zip(names, tensors, strict=True)), case.backend)
        return h, *last

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=case.T > 5)
