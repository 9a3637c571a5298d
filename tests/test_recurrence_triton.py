"""The recurrence's Triton kernels in small: every branch of them, fast enough to run while one
works. The operation's other tests run them too, and are slow there."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recurrence_cases import ON_CPU, check_replayed

import xlstm_kernels as xk
from xlstm_kernels.backends import UNAVAILABLE, Backend
from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.mlstm import triton_launch as mlstm_launch
from xlstm_kernels.ops.recurrence import op
from xlstm_kernels.ops.recurrence import triton as backend
from xlstm_kernels.testing import (
    WIDENED,
    RecurrenceCase,
    call_recurrence,
    check_recurrence,
    check_results,
    recurrence_inputs,
    relative_error,
    run_recurrence,
)

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# One head, two stretches between checkpoints, of which the second is short.
SMALL = {"B": 2, "T": 18, "H": 1, "D": 5}
CASES = [
    *(RecurrenceCase(cell, "triton", **SMALL) for cell in CELLS),
    *(
        RecurrenceCase("slstm", "triton", **SMALL | variant)
        for variant in (
            {"T": 1, "H": 2, "D": 20, "state": "zero", "bias": False},
            {"lengths": (3, 0, 17), "n_floor": 1.0, "clip_grad": 0.05},
            {"T": 3, "B": 9, "dtype": torch.bfloat16, "layout": "head_first"},
        )
    ),
    RecurrenceCase("lstm", "triton", **SMALL | {"T": 3, "dtype": torch.float16}),
    RecurrenceCase("slstm", "triton", **SMALL | {"lengths": (0, 1, 0), "n_floor": 1.0}),
]
# A step's programs have four units each: some to spare, several heads, more than a tile of
# sequences, and a sum of more than one part.
STEPS = [
    *(RecurrenceCase(cell, "triton", **SMALL | {"T": 1}) for cell in CELLS),
    *(
        RecurrenceCase("slstm", "triton", **SMALL | {"T": 1} | variant)
        for variant in (
            {"lengths": (0, 1, 0)},
            {"B": 9, "H": 2, "dtype": torch.bfloat16, "layout": "head_first"},
            {"state": "zero", "bias": False, "layout": "strided"},
            {"weight_dtype": torch.bfloat16, "n_floor": 1.0},
        )
    ),
]
MORE_STEPS = [
    RecurrenceCase(cell, "triton", T=1, **variant)
    for cell in CELLS
    for variant in (
        *({"B": 17, "D": 27, "H": 1, "dtype": dtype} for dtype in backend.DTYPES),
        *({"D": 7, "layout": layout} for layout in ("head_first", "expanded", "strided")),
        *({"D": 7, "state": state} for state in ("zero", "large", "empty")),
        *({"D": 7, "gates": gates} for gates in (50.0, 100.0)),
        *({"D": 7, "lengths": lengths} for lengths in ((1,), (0, 0, 1), (1, 0))),
        {"D": 7, "bias": False, "n_floor": 1.0},
    )
]
MORE_STEPS += [
    RecurrenceCase("lstm", "triton", T=1, B=1, H=1, D=136, weight_dtype=weight)
    for weight in backend.DTYPES
]


@ON_CPU
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_cases(case):
    check_recurrence(case)


@ON_CPU
@pytest.mark.parametrize(
    "launch",
    [
        {"dot": "ieee", "rows": 16},
        {"dot": "tf32"},
        {"held": False},
        {"dot": "ieee", "rows": 16, "held": False},
    ],
    ids=str,
)
def test_other_launches(launch, monkeypatch):
    """What other chips, dtypes and widths run: operands of one part, R read in every step."""
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda *args: choose(*args)._replace(**launch))
    check_recurrence(RecurrenceCase("lstm", "triton", **SMALL | {"T": 3, "D": 20}))


@ON_CPU
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_one_step(case, monkeypatch):
    check_step(case, monkeypatch)


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_STEPS, ids=str)
def test_more_steps(case, monkeypatch):
    check_step(case, monkeypatch)


def check_step(case, monkeypatch):
    """Of a step without a gradient, in which no loop is launched."""
    monkeypatch.setattr(backend, "choose", None)  # the kernels that loop ask it
    inputs = recurrence_inputs(case)
    exact = {name: t.double() for name, t in inputs.items()}
    check_results(
        run_recurrence(case, inputs, "triton", wanted=()),
        run_recurrence(replace(case, dtype=torch.float64), exact, "reference", wanted=()),
        iter([run_recurrence(case, inputs, "reference", wanted=())]),
    )


@ON_CPU
def test_sequences_of_one_token_give_what_steps_do():
    """Lengths on a device are not known here, so the loop runs those. It adds the same products in
    another order: some roundings of 6e-8 apart."""
    case = RecurrenceCase("slstm", "triton", **SMALL | {"lengths": (1, 1, 1)})
    inputs = recurrence_inputs(case)
    packed = run_recurrence(case, inputs, "triton", wanted=())
    each = inputs | {"x": inputs["x"].transpose(0, 1)}
    apart = run_recurrence(replace(case, lengths=None, B=3, T=1), each, "triton", wanted=())
    assert relative_error(apart["h"].transpose(0, 1), packed["h"]) < 1e-6
    for name in ("last_c", "last_n", "last_m"):
        assert relative_error(apart[name], packed[name]) < 1e-6


def test_every_cell_has_a_step():
    from xlstm_kernels.cells.triton_cells import STEPS

    assert list(STEPS) == list(CELLS)


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_what_comes_later_changes_no_bit(cell):
    case = RecurrenceCase(cell, "triton", B=3, T=18, H=1, D=7)
    inputs = recurrence_inputs(case)
    h, _ = call_recurrence(case, inputs, "triton")
    changed = inputs["x"].clone()
    changed[:, 11:] = 3 - changed[:, 11:]
    h_changed, _ = call_recurrence(case, inputs | {"x": changed}, "triton")
    assert torch.equal(h_changed[:, :11], h[:, :11])
    assert not torch.equal(h_changed[:, 11], h[:, 11])


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize("forward", ["cpu", "triton"])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_of_another_backends_forward(cell, forward):
    """What forward saves belongs to the operation."""
    case = RecurrenceCase(cell, "triton", **SMALL | {"T": 35})
    inputs = recurrence_inputs(case)
    state = torch.stack([inputs[f"{f}0"] for f in CELLS[cell].State._fields])
    call = (inputs["x"], inputs["r"], inputs["b"], state, None, cell, 0.0, True)
    h, last, raw, checkpoints = op.forward(*call, forward)
    given = (h, last, inputs["r"], raw, checkpoints, None, cell, 0.0, None)
    got, want = (
        op.backward(*given, inputs["x"].new_empty(0), [True] * 3, by) for by in ("triton", "cpu")
    )
    for part, expected in zip(got, want, strict=True):
        assert relative_error(part, expected) < 1e-5


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize(("T", "D"), [(20, 64), (1, 64), (1, 1000)])
@pytest.mark.parametrize("cell", CELLS)
def test_captured_in_a_graph(cell, T, D):
    check_replayed(RecurrenceCase(cell, "triton", B=9, T=T, H=2, D=D))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "D"), [(65, 20), (65, 64), (65, 100), (1, 20), (1, 100), (1, 768), (1, 1000)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_on_a_device(cell, T, D, dtype):
    case = RecurrenceCase(cell, "triton", B=9, T=T, H=2, D=D, dtype=dtype)
    inputs = recurrence_inputs(case)
    wanted = None if T > 1 else ()
    got = run_recurrence(
        case, {name: t.cuda() for name, t in inputs.items()}, "triton", wanted=wanted
    )
    exact = {name: t.double() for name, t in inputs.items()}
    check_results(
        {name: t.cpu() for name, t in got.items()},
        run_recurrence(replace(case, dtype=torch.float64), exact, "reference", wanted=wanted),
        iter([run_recurrence(case, inputs, "reference", wanted=wanted)]),
        WIDENED["cuda"],
        None if dtype is torch.float32 else torch.float16,
    )


@pytest.mark.parametrize(
    ("chip_of", "chips"),
    [
        (backend.chip_of, ["sm_80", "sm_90"]),
        (lambda x: mlstm_launch.chip_of(x, False), ["any", "hopper"]),
    ],
)
def test_a_launch_is_for_the_tensors_chip(chip_of, chips, monkeypatch):
    """Of a machine with two unlike ones, whichever is current."""
    current = [0]

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    def target():
        return SimpleNamespace(backend="cuda", arch=(80, 90)[current[0]])

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=target))
    monkeypatch.setattr("triton.runtime.driver", driver)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend, "TRITON_INTERPRETED", False)
    tensors = [SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1)]
    assert [chip_of(tensor) for tensor in tensors] == chips


@ON_CPU
@pytest.mark.parametrize(
    ("D", "dtype", "text"),
    [
        (129, torch.float32, "a program runs a whole head: D at most 128 but for a step without a"),
        (2, torch.float64, "x must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_is_refused_has_a_reason(D, dtype, text):
    why = f"^lstm: backend 'triton' cannot run this call: {text}"
    for T, wanted in ((3, False), (1, True)):
        x = torch.zeros(1, T, 4, 1, D, dtype=dtype, requires_grad=wanted)
        with pytest.raises(NotImplementedError, match=why):
            xk.lstm(x, torch.zeros(4, 1, D, D, dtype=dtype), backend="triton")
