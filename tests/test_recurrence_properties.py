"""What holds for every cell and backend whatever the numbers: splitting, causality, permutation,
packing, determinism, and the accuracy of the gates' functions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from recurrence_cases import EACH_BACKEND, SLSTM_CELLS, SWIFT_BACKENDS, on_every_backend

import xlstm_kernels as xk
from xlstm_kernels.cells import CELLS
from xlstm_kernels.testing import (
    RecurrenceCase,
    call_recurrence,
    recurrence_inputs,
    relative_error,
    run_recurrence,
)

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
EVERY_SWIFT_BACKEND = pytest.mark.parametrize("backend", SWIFT_BACKENDS)
EVERY_BACKEND = pytest.mark.parametrize("backend", EACH_BACKEND)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def taken(dtype: torch.dtype, backend: str) -> torch.dtype:
    """`dtype`, or float32 for a backend that has no float64."""
    return torch.float32 if backend == "cuda" and dtype is torch.float64 else dtype


def states_of(case: RecurrenceCase) -> tuple[str, ...]:
    return CELLS[case.cell].State._fields


def leaves_of(case: RecurrenceCase) -> dict[str, torch.Tensor]:
    inputs = recurrence_inputs(case)
    return {n: t.requires_grad_() for n, t in inputs.items() if not n.startswith("weight_")}


def loss_of(case: RecurrenceCase, h: torch.Tensor, last) -> torch.Tensor:
    """The loss of run_recurrence."""
    weights = recurrence_inputs(case)
    terms = [(h * weights["weight_h"]).sum(dtype=last.h.dtype)]
    terms += [(getattr(last, f) * weights[f"weight_last_{f}"]).sum() for f in last._fields]
    return torch.stack(terms).sum()


def gradients(loss: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """As close as two orders of summation leave them."""
    eps = torch.finfo(got.dtype).eps
    assert relative_error(got, want) <= (4 * eps if eps > 1e-4 else 1e-5), name


@EVERY_SWIFT_BACKEND
@EVERY_CELL
@given(T=st.integers(2, 40), data=st.data())
def test_split_anywhere(cell, backend, T, data):
    """One pass equals two with the state carried, gradients too."""
    at = data.draw(st.integers(0, T))
    case = RecurrenceCase(cell, backend, B=2, T=T, H=2, D=data.draw(st.integers(1, 20)))
    once, twice = leaves_of(case), leaves_of(case)
    h, last = call_recurrence(case, once, backend)
    first_h, carried = call_recurrence(case, twice | {"x": twice["x"][:, :at]}, backend)
    rest = {f"{field}0": part for field, part in carried._asdict().items()}
    second_h, second_last = call_recurrence(case, twice | rest | {"x": twice["x"][:, at:]}, backend)
    joined_h = torch.cat([first_h, second_h], dim=1)
    got = {"h": joined_h} | second_last._asdict()
    want = {"h": h} | last._asdict()
    got |= gradients(loss_of(case, joined_h, second_last), twice)
    want |= gradients(loss_of(case, h, last), once)
    for name in want:
        assert_close(got[name], want[name], name)


@EVERY_SWIFT_BACKEND
@EVERY_CELL
@given(T=st.integers(1, 40), data=st.data(), dtype=DTYPES)
def test_causal(cell, backend, T, data, dtype):
    """What comes at time t changes no bit of what was before."""
    t = data.draw(st.integers(0, T - 1))
    case = RecurrenceCase(cell, backend, B=3, T=T, H=1, D=7, dtype=taken(dtype, backend))
    inputs = recurrence_inputs(case)
    h, _ = call_recurrence(case, inputs, backend)
    changed = inputs["x"].clone()
    changed[:, t:] = 3 - changed[:, t:]
    h_changed, _ = call_recurrence(case, inputs | {"x": changed}, backend)
    assert torch.equal(h_changed[:, :t], h[:, :t])
    assert not torch.equal(h_changed[:, t], h[:, t])


@EVERY_SWIFT_BACKEND
@EVERY_CELL
@given(B=st.integers(1, 9), H=st.integers(1, 5), data=st.data())
def test_sequences_and_heads_are_independent(cell, backend, B, H, data):
    """Their order changes no bit of outputs, nor of the gradients that each has of its own."""
    case = RecurrenceCase(cell, backend, B=B, T=18, H=H, D=5)
    rows = torch.tensor(data.draw(st.permutations(range(B))))
    heads = torch.tensor(data.draw(st.permutations(range(H))))
    inputs = recurrence_inputs(case)
    permuted = {}
    for name, t in inputs.items():
        head_axis = {"x": 3, "r": 1, "b": 1, "weight_h": 2}.get(name, 1)
        t = t.index_select(head_axis, heads)
        permuted[name] = t if name in ("r", "b") else t.index_select(0, rows)
    got = run_recurrence(case, permuted, backend)
    want = run_recurrence(case, inputs, backend)
    for name in set(want) - {"d_r", "d_b"}:
        head_axis = {"d_x": 3, "h": 2}.get(name, 1)
        expected = want[name].index_select(head_axis, heads).index_select(0, rows)
        assert torch.equal(got[name], expected), name


@EVERY_SWIFT_BACKEND
@EVERY_CELL
@given(lengths=st.lists(st.integers(0, 35), max_size=8).map(tuple), dtype=DTYPES)
@example(lengths=(), dtype=torch.float32)
@example(lengths=(0, 0), dtype=torch.float32)
@example(lengths=(16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16), dtype=torch.float32)
def test_packed_equals_loop_over_sequences(cell, backend, lengths, dtype):
    dtype = taken(dtype, backend)
    case = RecurrenceCase(cell, backend, H=2, D=6, lengths=lengths, dtype=dtype)
    packed, looped = leaves_of(case), leaves_of(case)
    h, last = call_recurrence(case, packed, backend)
    pieces, lasts, start = [h.new_empty(1, 0, 2, 6)], [], 0
    for row, length in enumerate(lengths):
        one = {f"{f}0": looped[f"{f}0"][row : row + 1] for f in states_of(case)}
        one |= {"x": looped["x"][:, start : start + length]}
        piece, state = call_recurrence(replace(case, lengths=None), looped | one, backend)
        pieces.append(piece)
        lasts.append(state)
        start += length
    joined_h = torch.cat(pieces, dim=1)
    assert joined_h.shape == h.shape and last.h.shape == (len(lengths), 2, 6)
    if not lengths:
        return
    joined_last = type(last)(*(torch.cat(parts) for parts in zip(*lasts, strict=True)))
    got = {"h": h} | last._asdict() | gradients(loss_of(case, h, last), packed)
    want = {"h": joined_h} | joined_last._asdict()
    want |= gradients(loss_of(case, joined_h, joined_last), looped)
    for name in got:
        assert_close(got[name], want[name], name)


@EVERY_SWIFT_BACKEND
@EVERY_CELL
@given(
    gates=st.sampled_from([None, 20.0, 50.0, 100.0, 1e4]),
    size=st.sampled_from(["zero", "random", "large"]),
    dtype=DTYPES,
)
def test_finite_for_any_gates(cell, backend, gates, size, dtype):
    dtype = taken(dtype, backend)
    case = RecurrenceCase(cell, backend, B=2, T=33, H=1, D=5, gates=gates, state=size, dtype=dtype)
    for name, result in run_recurrence(case, recurrence_inputs(case), backend).items():
        assert result.isfinite().all(), name


@EVERY_BACKEND
@EVERY_CELL
def test_nan_stays_in_its_sequence(cell, backend):
    case = RecurrenceCase(cell, backend, B=5, T=20, H=2, D=9)
    inputs = recurrence_inputs(case)
    inputs["x"][2, 7, :, 0, 3] = torch.nan
    h, last = call_recurrence(case, inputs, backend)
    assert h[2, 7, 0, 3].isnan() and h[2, 8:, 0].isnan().all()
    h[2, 7:, 0] = 0
    assert h.isfinite().all()
    assert last[-1][2, 0].isnan().all() and last[-1][[0, 1, 3, 4]].isfinite().all()


@EVERY_BACKEND
def test_slstm_of_a_state_that_overflows_a_float(backend):
    """n' / o' does at n = 1e13 and o = -60: what is left of h is 0."""
    x_BTGHD, r_GHDE = torch.zeros(1, 3, 4, 1, 16), torch.zeros(4, 1, 16, 16)
    x_BTGHD[:, :, 3], x_BTGHD[:, :, 1] = -60, 50
    state = xk.SLSTMState(*(torch.full((1, 1, 16), value) for value in (0.0, 5e12, 1e13, 0.0)))
    h_BTHD, _ = xk.slstm(x_BTGHD, r_GHDE, state=state, backend=backend)
    assert h_BTHD.abs().max() < 1e-20


@pytest.mark.slow
@pytest.mark.parametrize("case", on_every_backend({"B": 1, "T": 20_000, "H": 1, "D": 4}))
def test_long_sequences_do_not_drift(case):
    inputs = recurrence_inputs(case)
    exact = {name: t.double() for name, t in inputs.items()}
    got = run_recurrence(case, inputs, case.backend)
    # The oracle is cpu in float64, which other tests hold to the reference: a loop of 20000 steps
    # in plain torch takes a minute.
    want = run_recurrence(replace(case, dtype=torch.float64), exact, "cpu")
    for name in ("h", "d_x"):
        assert relative_error(got[name][:, :100], want[name][:, :100]) < 1e-4, name
        assert relative_error(got[name][:, -100:], want[name][:, -100:]) < 1e-4, name
    assert all(result.isfinite().all() for result in got.values())


@pytest.mark.parametrize(
    "case",
    # The second has more heads than a task of `cpu` takes, and threads share them otherwise.
    on_every_backend({"B": 13, "T": 40, "H": 3, "D": 24}, {"B": 2, "T": 20, "H": 11, "D": 5}),
)
def test_same_inputs_same_bits(case, threads):
    inputs = recurrence_inputs(case)
    runs = {}
    for count in (1, 2):
        threads(count)
        runs[count] = run_recurrence(case, inputs, case.backend)
        again = run_recurrence(case, inputs, case.backend)
        for name, result in again.items():
            assert torch.equal(result, runs[count][name]), name
    # The sums of dr and db over sequences may be grouped by thread; all else has the same bits.
    for name in set(runs[1]) - {"d_r", "d_b"}:
        assert torch.equal(runs[1][name], runs[2][name]), name


@pytest.mark.parametrize("case", on_every_backend({"T": 20, "D": 9}))
def test_backward_twice(case):
    """A kernel that overwrites what it saved gives other gradients the second time."""
    leaves = leaves_of(case)
    loss = loss_of(case, *call_recurrence(case, leaves, case.backend))
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.medium
@EVERY_CELL
def test_second_derivative_of_the_reference(cell):
    case = RecurrenceCase(cell, "reference", B=1, T=2, H=1, D=2, dtype=torch.float64)
    leaves = leaves_of(case)

    def outputs(*tensors):
        h, last = call_recurrence(case, dict(zip(leaves, tensors, strict=True)), "reference")
        return h, *last

    assert torch.autograd.gradgradcheck(outputs, list(leaves.values()))


@pytest.mark.parametrize("case", on_every_backend({"T": 2, "D": 3}))
def test_second_derivative_of_a_kernel_is_refused(case):
    leaves = leaves_of(case)
    h, _ = call_recurrence(case, leaves, case.backend)
    (dx,) = torch.autograd.grad(h.square().sum(), leaves["x"], create_graph=True)
    message = f"{CELLS[case.cell].function}: backend '{case.backend}' has no second derivative"
    with pytest.raises(NotImplementedError, match=message):
        dx.sum().backward()


@pytest.mark.parametrize("case", on_every_backend({"T": 2, "D": 3}))
def test_second_derivative_is_refused_where_one_input_alone_has_a_gradient(case):
    """The other inputs are frozen, and h.sum() has no gradient of its own to differentiate by."""
    message = f"{CELLS[case.cell].function}: backend '{case.backend}' has no second derivative"
    inputs = {name: leaf.detach() for name, leaf in leaves_of(case).items()}
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        h, _ = call_recurrence(case, inputs | {name: leaf}, case.backend)
        (grad,) = torch.autograd.grad(h.sum(), leaf, create_graph=True)
        # Another path to the leaf, which alone would give a number.
        with pytest.raises(NotImplementedError, match=message):
            torch.autograd.grad(grad.square().sum() + leaf.square().sum(), leaf)


@pytest.mark.parametrize("case", on_every_backend({"T": 0, "D": 3}))
@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_tokens_leave_a_gradient(case, backend):
    inputs = {name: leaf.detach() for name, leaf in leaves_of(case).items()}
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        h, _ = call_recurrence(case, inputs | {name: leaf}, backend or case.backend)
        (grad,) = torch.autograd.grad(h.sum(), leaf)
        assert grad.shape == leaf.shape and not grad.any(), name


@EVERY_BACKEND
@pytest.mark.parametrize("cell", SLSTM_CELLS)
def test_empty_normaliser_is_tested_per_element(cell, backend):
    """Peers test whether all of n is 0, so one started unit changes the others."""
    case = RecurrenceCase(cell, backend, B=2, T=5, H=1, D=8)
    inputs = recurrence_inputs(case)
    for name in ("h0", "c0", "n0", "m0"):
        inputs[name][:, :, ::2] = 0
    inputs["r"].zero_()
    h, _ = call_recurrence(case, inputs, backend)
    fresh, _ = call_recurrence(case, {k: inputs[k] for k in ("x", "r", "b")}, backend)
    assert torch.equal(h[..., ::2], fresh[..., ::2])


@EVERY_BACKEND
@pytest.mark.parametrize("cell", SLSTM_CELLS)
def test_clip_grad_leaves_the_forward_alone(cell, backend):
    """A peer's gradient bound also clips h."""
    case = RecurrenceCase(cell, backend, state="zero")
    inputs = recurrence_inputs(case)
    h, _ = call_recurrence(case, inputs, backend)
    clipped, _ = call_recurrence(replace(case, clip_grad=1e-3), inputs, backend)
    assert torch.equal(clipped, h)
    same = run_recurrence(replace(case, clip_grad=1e9), inputs, backend)
    for name, result in run_recurrence(case, inputs, backend).items():
        assert torch.equal(same[name], result), name


def single_gates(function: str, values: torch.Tensor, backend: str) -> torch.Tensor:
    """One of the gates' functions, read off a step of a cell whose other gates are trivial."""
    gates = {gate: torch.zeros_like(values) for gate in "ifzo"}
    c, n, m = torch.zeros_like(values), torch.zeros_like(values), torch.zeros_like(values)
    if function == "tanh":  # n = 0, so i wins: c' = tanh(z)
        gates["z"] = values
    elif function == "sigmoid":  # i = -inf in effect, so c' = n' = 1: h' = sigmoid(o)
        gates["i"], gates["f"], gates["o"], c, n = (
            gates["i"] - 1e4,
            gates["f"] + 100,
            values,
            c + 1,
            n + 1,
        )
    elif function == "logsigmoid":  # f wins: m' = log_sigmoid(f)
        gates["i"], gates["f"], n = gates["i"] - 1e4, values, n + 1
    elif function == "exp":  # i = 0 wins over lf = m < 0, z = 0: c' = exp(m)
        gates["f"], c, n, m = gates["f"] + 100, c + 1, n + 1, values
    H = 4
    x = torch.stack(list(gates.values())).view(1, 1, 4, H, -1)
    state = tuple(part.view(1, H, -1) for part in (torch.zeros_like(values), c, n, m))
    r = x.new_zeros(4, H, values.numel() // H, values.numel() // H)
    h, last = xk.slstm(x, r, state=state, backend=backend)
    return {"tanh": last.c, "exp": last.c, "logsigmoid": last.m, "sigmoid": h[0]}[
        function
    ].flatten()


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        *(("tanh", low, high) for low, high in ((1e-6, 1e-3), (0.01, 0.5), (0.5, 8), (-8, -0.5))),
        *(("exp", low, high) for low, high in ((-0.02, 0), (-1, 0), (-20, -1), (-80, -60))),
        *(("sigmoid", low, high) for low, high in ((-0.1, 0.1), (-8, -1), (1, 8), (-50, -20))),
        *(("logsigmoid", low, high) for low, high in ((-50, -1), (-1, 1), (1, 6), (6, 15))),
    ],
)
def test_gates_are_accurate_and_unbiased(function, low, high, backend):
    """Errors of single roundings, whose mean is near 0: a bias would grow with T, their spread only
    with its root."""
    draw = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(8):
        values = torch.rand(400, generator=draw) * (high - low) + low
        exact = getattr(torch, function, torch.nn.functional.logsigmoid)(values.double())
        got = single_gates(function, values, backend).double()
        # m adds log_sigmoid to a state of order one.
        size = exact.abs().clamp(min=1.0) if function == "logsigmoid" else exact.abs()
        errors.append((got - exact) / size * 2**24)
    error = torch.cat(errors)
    assert error.abs().max() <= 5.0
    # A tanh at 1.0 to 1.2 put d_h0 through 33 steps of LSTM over its budget in 12 % of 60
    # seeds, with the gates' functions in float64 in none.
    assert error.square().mean().sqrt() <= 0.98
    # A range of x meets a few of exp's 32 table entries; their own roundings do not average out.
    assert abs(error.mean()) <= 0.3
