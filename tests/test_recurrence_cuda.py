"""The CUDA kernels of the recurrence: each launch shape, what they refuse, and on a device streams
and graphs. The operation's other tests run them on the emulator too."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from recurrence_cases import all_results, check_replayed, on_every_backend

import xlstm_kernels as xk
from xlstm_kernels.backends import CUDA_EMULATOR, load_cuda
from xlstm_kernels.cells import CELLS
from xlstm_kernels.memory import CPU_DTYPES
from xlstm_kernels.ops.recurrence import cuda, launch, op
from xlstm_kernels.ops.recurrence.launch import BACKWARD, FORWARD, Chip, launch_shape
from xlstm_kernels.testing import (
    RecurrenceCase,
    call_recurrence,
    check_recurrence,
    check_results,
    recurrence_inputs,
    relative_error,
    run_recurrence,
)

CUDA_EXTENSION = importlib.util.find_spec("xlstm_kernels._cuda")
emulated = pytest.mark.skipif(
    CUDA_EMULATOR is None, reason="the emulator is built by `make emulated`"
)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(CUDA_EXTENSION is None, reason="xlstm_kernels._cuda is not built"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A head of each launch shape, with units to spare, in two tiles of sequences.
EVERY_SHAPE = [
    {"B": 9, "T": 18, "H": 2, "D": D, "dtype": dtype} for D in (20, 56, 100) for dtype in DTYPES
]
# Chips that have no clusters and are too small for what one block could do: for heads of 20 units,
# several teams at a time and one after another's work; for wider ones, blocks of 16 units and of
# 32, and R of which some is in shared and some in global memory.
SMALL = {"D": 20, "B": 9, "T": 5}
TEAMS = [
    (Chip("8.0", 8, 8 << 10), SMALL),
    (Chip("8.0", 6, 8 << 10), SMALL | {"T": 18, "H": 3}),
    (Chip("8.0", 2, 8 << 10), SMALL | {"lengths": (0, 5, 0, 17, 17, 0, 2, 0, 1, 4)}),
    (Chip("8.0", 2, 8 << 10), SMALL | {"B": 0}),
    (Chip("8.0", 2, 8 << 10), SMALL | {"T": 0}),
    (Chip("8.0", 16, 163 << 10), {"D": 136, "T": 4}),
    (Chip("8.0", 9, 24 << 10), {"D": 280, "T": 3, "H": 1}),
    (Chip("8.0", 11, 8 << 10), {"D": 328, "T": 2, "H": 1}),
]
# Of three blocks and of sixteen, of 16 units and of 32, with R in registers alone and in shared
# memory.
SMALL_CLUSTERS = Chip("9.0", 8, 64 << 10)
CLUSTERS = [
    (SMALL_CLUSTERS, {"D": 72, "B": 9, "T": 5}),
    (SMALL_CLUSTERS, {"D": 72, "T": 18, "H": 1}),
    (SMALL_CLUSTERS, {"D": 72, "lengths": (0, 5, 0, 17, 2, 0, 1, 0, 1, 4)}),
    (SMALL_CLUSTERS, {"D": 72, "T": 0}),
    (Chip("9.0", 16, 48 << 10), {"D": 200, "T": 3, "H": 1}),
    (launch.EMULATED, {"D": 260, "T": 3, "H": 1}),
    (launch.EMULATED, {"D": 512, "T": 2, "H": 1}),
]
TEAMS_ON_A_DEVICE = [
    {"B": B, "H": H, "D": D, "dtype": dtype}
    for B, H, D in ((9, 2, 136), (70, 3, 300), (3, 1, 1000))
    for dtype in DTYPES
]
STEPS_ON_A_DEVICE = [
    {"B": 9, "T": 1, "D": D, "dtype": dtype} for D in (27, 1000) for dtype in DTYPES
]


@pytest.mark.parametrize("case", on_every_backend(*EVERY_SHAPE, backends=["cuda"]))
def test_every_launch_shape(case):
    check_recurrence(case)


def on_small_chips(teams):
    """pytest parameters: each of `teams` in each dtype and for each cell."""
    found = [
        pytest.param(
            chip, *case.values, id=f"{case.id}-SMs{chip.multiprocessors}", marks=case.marks
        )
        for chip, variant in teams
        for dtype in DTYPES
        for case in on_every_backend(variant | {"dtype": dtype}, backends=["cuda"])
    ]
    return pytest.mark.parametrize(("chip", "case"), found)


@on_small_chips(TEAMS[:1])
def test_teams(chip, case, monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", chip)
    check_recurrence(case)


@on_small_chips(TEAMS[1:])
def test_more_teams(chip, case, monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", chip)
    check_recurrence(case)


@on_small_chips(CLUSTERS[:1])
def test_clusters(chip, case, monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", chip)
    check_recurrence(case)


@on_small_chips(CLUSTERS[1:])
def test_more_clusters(chip, case, monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", chip)
    check_recurrence(case)


def to_tf32(x):
    """Rounded as the kernels do: 11 bits, a tie up."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture(params=[False, True])
def tf32_allowed(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@emulated
@pytest.mark.parametrize("D", [20, 72, 136])
def test_float32s_products_are_of_tf32_where_that_is_allowed(D, tf32_allowed):
    """R h and R^T draw, from what forward saves and backward returns of one step."""
    case = RecurrenceCase("lstm", "cuda", B=2, T=1, H=1, D=D, bias=False)
    inputs = recurrence_inputs(case)
    x, r = inputs["x"], inputs["r"]
    state = torch.stack([inputs["h0"], inputs["c0"]])
    none = (None, "lstm", 0.0)
    h, last, raw, checkpoints = op.forward(x, r, None, state, *none, True, "cuda")
    saved = (h, last, r, raw, checkpoints, *none, None, x.new_empty(0))
    dx, _, _, dstate = op.backward(*saved, [False, False, True], "cuda")
    for given, equation, got, start in (
        (state[0], "ghde,bhe->bghd", raw[:, 0], x[:, 0]),
        (dx[:, 0], "ghde,bghd->bhe", dstate[0], 0),
    ):
        full, cut = (
            start + torch.einsum(equation, of(r).double(), of(given).double())
            for of in (torch.clone, to_tf32)
        )
        assert relative_error(got, cut if tf32_allowed else full) < 1e-6
        assert 1e-5 < relative_error(got, full if tf32_allowed else cut) < 2**-10


# One step without a gradient: rows of R read four elements at a time and one, of a whole tile of
# sequences and of some more.
STEPS = [
    {"D": D, "B": B, "H": H, "T": 1, "dtype": dtype, "weight_dtype": weight}
    for D, B, H in ((24, 1, 3), (27, 9, 2), (136, 3, 1), (512, 2, 1))
    for dtype in DTYPES
    for weight in dict.fromkeys((dtype, torch.float32))
]


@pytest.mark.parametrize("case", on_every_backend(*STEPS[:5], backends=["cuda"]))
def test_one_step(case, monkeypatch):
    check_step(case, monkeypatch)


@pytest.mark.parametrize("case", on_every_backend(*STEPS[5:], backends=["cuda"]))
def test_more_steps(case, monkeypatch):
    check_step(case, monkeypatch)


@emulated
@pytest.mark.slow
@torch.no_grad()
def test_one_step_of_more_tiles_than_the_second_axis_of_a_grid_has():
    x, r = torch.randn(8 * 65535 + 1, 1, 4, 1, 1), torch.randn(4, 1, 1, 1)
    for got, want in zip(
        *(xk.lstm(x, r, backend=name)[1] for name in ("cuda", "cpu")), strict=True
    ):
        torch.testing.assert_close(got, want)


def check_step(case, monkeypatch):
    monkeypatch.setattr(cuda, "launch_shape", None)  # the kernels that loop ask it
    inputs = recurrence_inputs(case)
    # What lies at an odd place in memory cannot be read four elements at a time.
    odd = torch.cat([inputs["r"].new_zeros(1), inputs["r"].flatten()])[1:].view_as(inputs["r"])
    exact = one_step(case, {name: t.double() for name, t in inputs.items()}, "reference")
    for r in (inputs["r"], odd):
        got = one_step(case, inputs | {"r": r}, "cuda")
        check_results(got, exact, iter([one_step(case, inputs, "reference")]))


@torch.no_grad()
def one_step(case, inputs, backend):
    h, last = call_recurrence(case, inputs, backend)
    return {"h": h} | {f"{name}1": part for name, part in last._asdict().items()}


@emulated
def test_a_team_gives_the_same_bits_again(monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED", TEAMS[1][0])
    case = RecurrenceCase("slstm", "cuda", **SMALL | {"T": 20})
    inputs = recurrence_inputs(case)
    first, second = (run_recurrence(case, inputs, "cuda") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def deals_of(teams):
    """Every launch of `teams`."""
    return [
        launch_shape(
            way,
            case.D,
            torch.bfloat16 if dtype is torch.bfloat16 else torch.float32,
            case.sequences,
            case.H,
            chip,
        )
        for chip, variant in teams
        for dtype in DTYPES
        for case in [RecurrenceCase("lstm", "cuda", **variant | {"dtype": dtype})]
        for way in (FORWARD, BACKWARD)
        if case.sequences
    ]


def test_every_kind_of_team_is_among_those_tested():
    deals = deals_of(TEAMS)
    assert all(deal.is_team and not deal.is_cluster for deal in deals)
    assert {deal.units for deal in deals} == set(launch.TEAM_UNITS)
    assert any(deal.teams > 1 for deal in deals) and any(deal.rounds > 1 for deal in deals)
    assert {(deal.near > 0, deal.far > 0) for deal in deals} >= {
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    }


def test_every_kind_of_cluster_is_among_those_tested():
    deals = deals_of(CLUSTERS)
    assert all(deal.is_cluster for deal in deals)
    assert {deal.units for deal in deals} == set(launch.TEAM_UNITS)
    assert {deal.near > 0 for deal in deals} == {False, True}
    assert {deal.parts for deal in deals} >= {3, launch.CLUSTER}
    assert any(deal.teams > 1 for deal in deals) and any(deal.rounds > 1 for deal in deals)


@pytest.mark.parametrize("operand", launch.HELD, ids=str)
@pytest.mark.parametrize("way", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_cluster_holds_r_where_a_chip_has_clusters(way, operand):
    for D in (129, 192, 256, 320, 512, 513, 1024):
        for chip in launch.CHIPS.values():
            deal = launch_shape(way, D, operand, 16, 1, chip)
            if D <= 256:
                assert deal.is_cluster == (chip in (launch.CHIPS["9.0"], launch.CHIPS["10.0"]))
            if deal.is_cluster:
                assert deal.far == 0 and deal.parts <= launch.CLUSTER and chip.has_clusters


def test_the_team_predicted_to_be_fastest_is_launched():
    """In float32 a cluster's blocks of 32 units, R of which shared memory has to give at every
    step, are slower than twice as many blocks that meet through L2."""
    chip = launch.CHIPS["9.0"]
    narrow, wide = (launch_shape(FORWARD, D, torch.float32, 16, 1, chip) for D in (256, 512))
    assert (narrow.is_cluster, narrow.units) == (True, 16)
    assert (wide.is_cluster, wide.units) == (False, 16)
    # Where not all of them fit at once, wider blocks take fewer rounds.
    many = launch_shape(FORWARD, 256, torch.float32, 64, 4, chip)
    assert (many.is_cluster, many.units, many.rounds) == (True, 32, 2)


@emulated
def test_launches_are_those_of_the_kernels():
    """What is asked for, in shared memory and in threads, is what kernels take."""
    for shape in load_cuda(emulated=True).recurrence_launch_shapes():
        way = FORWARD if shape["direction"] == "forward" else BACKWARD
        if shape["team"]:
            held = launch.HELD[CPU_DTYPES[shape["operand"]]][shape["cluster"]]
            assert (shape["held"], shape["threads"]) == (held, launch.TEAM_THREADS)
            assert shape["shared_bytes"] == launch.own_bytes(way, min(launch.TEAM_UNITS))
            continue
        deal = launch_shape(way, shape["D"], CPU_DTYPES[shape["operand"]], 1, 1, launch.EMULATED)
        assert (deal.units, deal.threads) == (shape["D"], shape["threads"])
        assert deal.shared_bytes == shape["shared_bytes"]


@emulated
def test_the_emulated_chip_is_the_emulators():
    [device] = load_cuda(emulated=True).devices()
    chip = launch.EMULATED
    assert device["multiprocessors"] == chip.multiprocessors
    assert device["shared_bytes"] == chip.shared_bytes


@emulated
@pytest.mark.parametrize(
    ("D", "dtype", "text"),
    [
        (513, torch.float32, "D must be at most 512 on this device, it has 16 multiprocessors"),
        (2, torch.float64, "x must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_is_refused_has_a_reason(D, dtype, text):
    x, r = torch.zeros(1, 3, 4, 1, D, dtype=dtype), torch.zeros(4, 1, D, D, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"^lstm: backend 'cuda' cannot run .*: {text}$"):
        xk.lstm(x, r, backend="cuda")
    xk.lstm(x, r)


@emulated
def test_an_older_chip_is_refused(monkeypatch):
    """Kernels are compiled from sm_80 on; `auto` goes on to a backend that runs there."""
    monkeypatch.setattr(cuda, "EMULATED", Chip("7.5", 40, 64 << 10))
    x, r = torch.zeros(1, 3, 4, 1, 2), torch.zeros(4, 1, 2, 2)
    with pytest.raises(NotImplementedError, match=r"compute capability 8.0, x's has 7.5$"):
        xk.lstm(x, r, backend="cuda")


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


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=gpu) for cell in CELLS])
@pytest.mark.parametrize(
    "variant",
    [{**v, "T": 65} for v in (*EVERY_SHAPE, *TEAMS_ON_A_DEVICE)] + STEPS_ON_A_DEVICE,
    ids=str,
)
def test_on_a_device(cell, variant):
    case = RecurrenceCase(cell, "cuda", **variant)
    wanted = None if case.T > 1 else ()  # a step with a gradient is a loop's
    inputs = recurrence_inputs(case)
    on_device = {name: t.cuda() for name, t in inputs.items()}
    got = run_recurrence(case, on_device, "cuda", wanted=wanted)
    exact = {name: t.double() for name, t in inputs.items()}
    check_results(
        {name: t.cpu() for name, t in got.items()},
        run_recurrence(replace(case, dtype=torch.float64), exact, "reference", wanted=wanted),
        iter([run_recurrence(case, inputs, "reference", wanted=wanted)]),
        1.5,
        None if case.dtype is torch.float32 else torch.float16,
    )


@pytest.mark.parametrize("device", [pytest.param(device, marks=gpu) for device in (0, 1)])
@pytest.mark.parametrize(("T", "D"), [(20, 64), (20, 256), (20, 1000), (1, 64)])
def test_on_each_device_and_on_a_stream_of_its_own(device, T, D):
    """Where the first device is the current one, tensors say on which a kernel runs."""
    if device >= torch.cuda.device_count():
        pytest.skip(f"there is no device {device}")
    case = RecurrenceCase("slstm", "cuda", B=9, T=T, H=2, D=D)
    inputs = {name: t.cuda(device) for name, t in recurrence_inputs(case).items()}
    want = all_results(case, inputs)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(t) for name, t in inputs.items()}
        torch.cuda._sleep(50_000_000)  # who does not wait for it reads zeros
        for name, t in late.items():
            t.copy_(inputs[name])
        got = all_results(case, late)
    stream.synchronize()
    assert torch.cuda.current_device() == 0
    for result, expected in zip(got, want, strict=True):
        assert result.device.index == device and torch.equal(result, expected)


# A block's head, a cluster's where the chip has clusters, a team's, and one step.
@pytest.mark.parametrize("cell", [pytest.param(cell, marks=gpu) for cell in CELLS])
@pytest.mark.parametrize(("T", "D"), [(20, 64), (20, 256), (20, 1000), (1, 64), (1, 1000)])
def test_captured_in_a_graph(cell, T, D):
    check_replayed(RecurrenceCase(cell, "cuda", B=9, T=T, H=2, D=D))
