"""LSTMCell: one step, a whole sequence, and the cells whose weights it takes over."""

import re

import pytest
import torch
from layer_cases import assert_near, seeded, with_gradients
from recurrence_cases import EACH_BACKEND, FLOAT64
from torch import nn

import xlstm_kernels as xk

EVERY_BACKEND = pytest.mark.parametrize("backend", EACH_BACKEND)


class HandWrittenCell(nn.Module):
    """The plain cell that people write: two linear maps, chunked into gates."""

    def __init__(self, input_size, hidden_size, gate_order, input_bias=True, hidden_bias=True):
        super().__init__()
        self.x2h = nn.Linear(input_size, 4 * hidden_size, bias=input_bias)
        self.h2h = nn.Linear(hidden_size, 4 * hidden_size, bias=hidden_bias)
        self.gate_order = gate_order

    def forward(self, x, state):
        h, c = state
        gates = dict(
            zip(self.gate_order, (self.x2h(x) + self.h2h(h)).chunk(4, dim=-1), strict=True)
        )
        c = torch.sigmoid(gates["f"]) * c + torch.sigmoid(gates["i"]) * torch.tanh(gates["g"])
        return torch.sigmoid(gates["o"]) * torch.tanh(c), c


@EVERY_BACKEND
@pytest.mark.parametrize("gate_order", ["ifgo", "ifog", "gofi"])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_cell_takes_over_a_hand_written_one(gate_order, biases, backend):
    torch.manual_seed(0)
    theirs = HandWrittenCell(5, 6, gate_order, *biases)
    ours = xk.nn.LSTMCell.from_linears(theirs.x2h, theirs.h2h, gate_order, backend=backend)
    x_BTE, h0, c0 = torch.randn(3, 7, 5), torch.randn(3, 6), torch.randn(3, 6)
    leaves = [[t.clone().requires_grad_() for t in (x_BTE, h0, c0)] for _ in range(2)]
    (x, *state), hidden = leaves[0], []
    state = tuple(state)
    for t in range(7):
        state = theirs(x[:, t], state)
        hidden.append(state[0])
    want_h = torch.stack(hidden, dim=1)
    want = with_gradients(theirs, torch.cat([want_h.flatten(), state[1].flatten()]))
    h, (h_last, c_last) = ours.unroll(leaves[1][0], tuple(leaves[1][1:]))
    got = with_gradients(ours, torch.cat([h.flatten(), c_last.flatten()]))
    assert_near(h, want_h)
    assert_near(h_last, state[0])
    assert_near(c_last, state[1])
    for a, b in zip(leaves[1], leaves[0], strict=True):
        assert_near(a.grad, b.grad)
    ours_to_theirs = [gate_order.index(gate) for gate in "ifgo"]
    for mine, yours in (
        ("weight_ih", "x2h.weight"),
        ("weight_hh", "h2h.weight"),
        ("bias", "x2h.bias" if biases[0] else "h2h.bias"),
    ):
        if mine in got:
            rows = want[yours].unflatten(0, (4, 6))[ours_to_theirs]
            assert_near(got[mine].view(rows.shape), rows)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_unroll(backend, dtype):
    if dtype is torch.float64 and backend not in FLOAT64:
        pytest.skip(f"backend {backend!r} has no float64")
    cell = seeded(xk.nn.LSTMCell, 5, 6, backend=backend, dtype=dtype)
    x_BTE = torch.randn(3, 9, 5, dtype=dtype)
    h_BTE, (h, c) = cell.unroll(x_BTE)
    want = with_gradients(cell, h_BTE)
    hidden, state = [], None
    for t in range(9):
        state = cell(x_BTE[:, t], state)
        hidden.append(state[0])
    got = with_gradients(cell, torch.stack(hidden, dim=1))
    assert_near(torch.stack(hidden, dim=1), h_BTE)
    assert_near(state[0], h)
    assert_near(state[1], c)
    for name in want:
        assert_near(got[name], want[name])


def test_cell_step_without_batch():
    cell = seeded(xk.nn.LSTMCell, 5, 6)
    x, state = torch.randn(2, 5), (torch.randn(2, 6), torch.randn(2, 6))
    h, c = cell(x, state)
    one_h, one_c = cell(x[0], (state[0][0], state[1][0]))
    assert one_h.shape == one_c.shape == (6,)
    assert_near(one_h, h[0])
    assert_near(one_c, c[0])


def test_cell_equals_torch_cell():
    theirs = nn.LSTMCell(5, 6)
    linears = []
    for kind in ("ih", "hh"):
        weight = getattr(theirs, f"weight_{kind}")
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight, linear.bias = weight, getattr(theirs, f"bias_{kind}")
        linears.append(linear)
    ours = xk.nn.LSTMCell.from_linears(*linears, gate_order="ifgo")
    x = torch.randn(4, 5)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert_near(a, b)


def test_cell_and_layer_share_a_state_dict():
    cell, layer = seeded(xk.nn.LSTMCell, 5, 6), xk.nn.LSTM(5, 6)
    layer.load_state_dict(cell.state_dict())
    x = torch.randn(2, 4, 5)
    assert torch.equal(cell.unroll(x)[0], layer(x)[0])


def test_cell_hidden_state_feeds_a_layer_of_the_same_dtype():
    cell = xk.nn.LSTMCell(5, 6, dtype=torch.bfloat16)
    h, c = cell(torch.randn(2, 5, dtype=torch.bfloat16))
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    nn.Linear(6, 2, dtype=torch.bfloat16)(h)


@pytest.mark.medium
def test_compiled_cell_step():
    torch.compiler.reset()
    cell = seeded(xk.nn.LSTMCell, 5, 6)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(2, 5), (torch.randn(2, 6), torch.randn(2, 6))
    for a, b in zip(compiled(x, state), cell(x, state), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: xk.nn.LSTMCell(6, 8)(torch.zeros(2, 3, 6)),
            "LSTMCell: x must be (B, input_size) or (input_size,), got (2, 3, 6)",
        ),
        (
            lambda: xk.nn.LSTMCell(6, 8).unroll(torch.zeros(2, 6)),
            "LSTMCell.unroll: x must be (B, T, input_size), got (2, 6)",
        ),
        (
            lambda: xk.nn.LSTMCell(6, 8)(torch.zeros(2, 6), (torch.zeros(8), torch.zeros(8))),
            "LSTMCell: h and c must be (B, hidden_size) like x, got (8,)",
        ),
        (
            lambda: xk.nn.LSTMCell.from_linears(nn.Linear(3, 16), nn.Linear(4, 16), "iofx"),
            "LSTMCell.from_linears: gate_order must be the letters i f g o in some order,"
            " got 'iofx'",
        ),
        (
            lambda: xk.nn.LSTMCell.from_linears(nn.Linear(3, 16), nn.Linear(4, 16), None),
            "LSTMCell.from_linears: gate_order must be the letters i f g o in some order, got None",
        ),
        (
            lambda: xk.nn.LSTMCell.from_linears(nn.Linear(3, 12), nn.Linear(4, 16), "ifgo"),
            "LSTMCell.from_linears: input_linear must have 4 * hidden_size = 16 outputs, got 12",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()


def test_from_linears_takes_linear_maps_alone():
    text = r"^LSTMCell.from_linears: hidden_linear must be a torch.nn.Linear, got Tensor$"
    with pytest.raises(TypeError, match=text):
        xk.nn.LSTMCell.from_linears(nn.Linear(3, 16), torch.zeros(16, 4), "ifgo")
