"""nn.LSTM replaced: every option against nn.LSTM itself, and which calls stay with it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import xlstm_kernels as xk
from xlstm_kernels.compat.torch_nn import FusedLSTM
from xlstm_kernels.testing import relative_error

# Of the bound, dtype by dtype: both sides are float32 or float64 sums of at most 20 terms.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture
def always(monkeypatch):
    """Calls that torch is faster at run on our kernels too."""
    monkeypatch.setattr(FusedLSTM, "_is_faster", lambda self, input: True)


def run(layer, form, dtype, batch_first, seed=1):
    """Outputs and gradients; `form` of the input is dense, unbatched or packed."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype, requires_grad=True)

    if form == "packed":
        x = [normal(length, 5) for length in (3, 6, 1)]
        given, batch = pack_sequence(x, enforce_sorted=False), (3,)
    elif form == "dense":
        given = normal(3, 4, 5)
        x, batch = [given], (3 if batch_first else 4,)
    else:
        given = normal(4, 5)
        x, batch = [given], ()
    cells = layer.num_layers * (2 if layer.bidirectional else 1)
    h0 = normal(cells, *batch, layer.proj_size or layer.hidden_size)
    c0 = normal(cells, *batch, layer.hidden_size)
    layer.zero_grad()
    torch.manual_seed(seed)  # of the dropout
    y, (h, c) = layer(given, (h0, c0))
    y = y.data if form == "packed" else y
    (y.square().sum() + h.sin().sum() + c.cos().sum()).backward()
    grads = [t.grad for t in (*x, h0, c0, *layer.parameters())]
    return [t.detach().clone() for t in (y, h, c, *grads)]


@pytest.mark.parametrize("form", ["dense", "unbatched", "packed"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_layers", "bias"), [(1, True), (2, True), (1, False)])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_every_option(always, form, batch_first, proj_size, bidirectional, num_layers, bias):
    for dtype, bound in BOUNDS.items():
        torch.manual_seed(0)
        layer = nn.LSTM(
            *(5, 7, num_layers, bias, batch_first, 0.5 if num_layers > 1 else 0.0),
            *(bidirectional, proj_size),
            dtype=dtype,
        )
        want = run(layer, form, dtype, batch_first)
        layer.__class__ = FusedLSTM
        for got, expected in zip(run(layer, form, dtype, batch_first), want, strict=True):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            assert relative_error(got, expected) <= bound


@pytest.mark.parametrize("batch_first", [True, False])
def test_output_can_be_viewed(always, batch_first):
    layer = nn.LSTM(5, 7, batch_first=batch_first)
    layer.__class__ = FusedLSTM
    layer(torch.randn(3, 4, 5))[0].view(12, 7)


def test_without_a_state_and_in_bfloat16(always):
    torch.manual_seed(0)
    layer = nn.LSTM(5, 7, 2, batch_first=True)
    x = torch.randn(3, 9, 5)
    exact, _ = layer(x)
    half = copy.deepcopy(layer).bfloat16()
    half.__class__ = FusedLSTM
    y, (h, c) = half(x.bfloat16())
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16
    assert relative_error(y, exact) <= 2e-2


def test_autocast(always):
    torch.manual_seed(0)
    layer = nn.LSTM(5, 7, batch_first=True)
    x = torch.randn(3, 9, 5)
    exact, _ = layer(x)
    layer.__class__ = FusedLSTM
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(x)
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16
    assert relative_error(y, exact) <= 2e-2


@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_autocast_keeps_the_dtypes_of_the_loop_over_steps(always, proj_size):
    """Where torch calls no oneDNN, states are not rounded."""
    torch.manual_seed(0)
    layer = nn.LSTM(5, 7, 2, batch_first=True, proj_size=proj_size)
    packed = pack_sequence([torch.randn(n, 5) for n in (3, 20, 1)], enforce_sorted=False)
    calls = [packed, torch.randn(3, 9, 5)] if proj_size else [packed]
    for given in calls:
        layer.__class__ = nn.LSTM
        exact = layer(given)[1][1]
        with torch.autocast("cpu", torch.bfloat16):
            want, (h_want, c_want) = layer(given)
            layer.__class__ = FusedLSTM
            got, (h, c) = layer(given)
        assert got[0].dtype == want[0].dtype
        assert h.dtype == h_want.dtype and c.dtype == c_want.dtype == torch.float32
        assert relative_error(c, exact) <= 2 * relative_error(c_want, exact)


@pytest.mark.parametrize(
    ("B", "T", "hidden", "trained", "ours"),
    [
        (8, 64, 7, False, True),
        (8, 64, 7, True, True),
        (9, 64, 7, False, False),
        (1, 1, 7, True, False),
        (1, 9, 128, True, True),
        (1, 9, 129, True, False),
        (2, 9, 256, True, True),
        (2, 9, 257, False, False),
    ],
)
def test_slower_calls_stay_with_torch(monkeypatch, B, T, hidden, trained, ours):
    layer = nn.LSTM(5, hidden, batch_first=True)
    xk.replace_layers(layer)
    calls = []
    monkeypatch.setattr(FusedLSTM, "_layers", lambda *args: calls.append(1) or 1 / 0)
    with torch.set_grad_enabled(trained):
        if ours:
            with pytest.raises(ZeroDivisionError):
                layer(torch.randn(B, T, 5))
        else:
            assert layer(torch.randn(B, T, 5))[0].shape == (B, T, hidden)
    assert bool(calls) is ours


@pytest.mark.parametrize(
    ("x", "hx"),
    [
        (torch.randn(2, 3, 4), None),
        (torch.randn(2, 3, 5), (torch.randn(1, 2, 7), torch.randn(1, 2, 8))),
        (torch.randn(2, 3, 5), (torch.randn(2, 7), torch.randn(2, 7))),
        (torch.randn(3, 5), (torch.randn(1, 1, 7), torch.randn(1, 1, 7))),
        (torch.randn(5), None),
        (torch.randn(2, 3, 5).double(), None),
        (torch.randn(2, 0, 5), None),
    ],
)
def test_errors_are_those_of_torch(x, hx):
    layer = nn.LSTM(5, 7, batch_first=True)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        layer(x, hx)
    layer.__class__ = FusedLSTM
    with pytest.raises(theirs.type) as ours:
        layer(x, hx)
    assert str(ours.value)[:60] == str(theirs.value)[:60]


@pytest.mark.medium
def test_packed_sequences_compile_without_a_break():
    """Sequences in any order; sorted ones do not say how many they are but by a value."""
    layer = nn.LSTM(5, 8, num_layers=2, bidirectional=True)
    xk.replace_layers(layer)

    def run(packed):
        y, (h, c) = layer(packed)
        return y.data, h, c

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for lengths in ((3, 20, 1), (4, 7, 30, 2)):
            x = [torch.randn(n, 5) for n in lengths]
            packed = pack_sequence(x, enforce_sorted=False)
            for got, want in zip(compiled(packed), run(packed), strict=True):
                assert relative_error(got, want) <= 1e-6
            layer.zero_grad()
            compiled(packed)[0].square().sum().backward()
            gradient = layer.weight_ih_l0_reverse.grad.clone()
            layer.zero_grad()
            run(packed)[0].square().sum().backward()
            assert relative_error(gradient, layer.weight_ih_l0_reverse.grad) <= 1e-6
