"""SLSTM and LSTM: shapes, what they take over, initialisation, and torch's own machinery."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from layer_cases import assert_near, seeded, with_gradients
from recurrence_cases import EACH_BACKEND
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import xlstm_kernels as xk

SEQUENCE_LAYERS = {
    "slstm": lambda **options: xk.nn.SLSTM(6, 8, **options),
    "slstm_exp": lambda **options: xk.nn.SLSTM(6, 8, 2, forget_gate="exp", **options),
    "lstm": lambda **options: xk.nn.LSTM(6, 8, **options),
    "lstm_heads": lambda **options: xk.nn.LSTM(6, 8, 4, **options),
}
EVERY_LAYER = pytest.mark.parametrize("name", SEQUENCE_LAYERS)
EVERY_BACKEND = pytest.mark.parametrize("backend", EACH_BACKEND)


@EVERY_LAYER
def test_sequence_layouts(name):
    """(B, T, E), (T, B, E) and (T, E) of one sequence hold the same numbers."""
    layer = seeded(SEQUENCE_LAYERS[name])
    time_first = seeded(SEQUENCE_LAYERS[name], batch_first=False)
    x_BTE = torch.randn(3, 5, 6)
    h_BTE, state = layer(x_BTE)
    H, D = layer.num_heads, layer.head_dim
    assert h_BTE.shape == (3, 5, 8)
    assert all(part.shape == (3, H, D) for part in state)
    assert torch.equal(h_BTE[:, -1].view(3, H, D), state.h)
    h_TBE, state_time_first = time_first(x_BTE.transpose(0, 1))
    assert torch.equal(h_TBE.transpose(0, 1), h_BTE)
    assert torch.equal(state_time_first.c, state.c)
    h_TE, one = layer(x_BTE[1])
    assert_near(h_TE, h_BTE[1])
    assert all(part.shape == (H, D) for part in one)
    assert_near(one.c, state.c[1])


@EVERY_LAYER
def test_state_goes_on(name):
    layer = seeded(SEQUENCE_LAYERS[name])
    x = torch.randn(2, 9, 6)
    h, state = layer(x)
    first, carried = layer(x[:, :4])
    second, last = layer(x[:, 4:], carried)
    assert_near(torch.cat([first, second], dim=1), h)
    assert_near(last.c, state.c)
    _, one_carried = layer(x[0, :4])
    one, _ = layer(x[0, 4:], one_carried)
    assert_near(one, h[0, 4:])


@EVERY_LAYER
@pytest.mark.parametrize("batch_axis", [True, False])
def test_packed_sequences(name, batch_axis):
    layer = seeded(SEQUENCE_LAYERS[name])
    x = torch.randn(11, 6)
    starts = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    packed = x[None] if batch_axis else x
    h, state = layer(packed, cu_seqlens=starts)
    assert h.shape == (*packed.shape[:-1], 8) and state.h.shape[0] == 3
    h = h.view(11, 8)
    for row, (begin, end) in enumerate([(0, 4), (4, 4), (4, 11)]):
        want, want_state = layer(x[begin:end])
        assert_near(h[begin:end], want)
        assert_near(state.c[row], want_state.c)
    again, _ = layer(packed, state, cu_seqlens=starts)
    assert again.shape == (*packed.shape[:-1], 8)


@EVERY_BACKEND
@EVERY_LAYER
def test_backends_agree(name, backend):
    x = torch.randn(3, 17, 6)
    results = []
    for chosen in (backend, "reference"):
        layer = seeded(SEQUENCE_LAYERS[name], backend=chosen)
        h, state = layer(x)
        results.append({"h": h, "c": state.c} | with_gradients(layer, h))
    for key, want in results[1].items():
        assert_near(results[0][key], want)


@EVERY_LAYER
def test_without_bias(name):
    layer = seeded(SEQUENCE_LAYERS[name], bias=False)
    assert set(layer.state_dict()) == {"weight_ih", "weight_hh"}
    layer(torch.randn(2, 3, 6))[0].sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@EVERY_BACKEND
def test_lstm_takes_over_torch_lstm(bias, batch_first, backend):
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 7, bias=bias, batch_first=batch_first)
    ours = xk.nn.LSTM.from_torch(theirs, backend=backend)
    results = []
    x, h0, c0 = torch.randn(3, 4, 5), torch.randn(2, 1, 7), torch.randn(2, 1, 7)
    x = x[:2] if batch_first else x[:, :2]
    for layer in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in (x, h0, c0)]
        if layer is theirs:
            state = leaves[1].transpose(0, 1), leaves[2].transpose(0, 1)
        else:
            state = leaves[1], leaves[2]
        h, (h_last, c_last) = layer(leaves[0], state)
        grads = with_gradients(layer, torch.cat([h.flatten(), h_last.flatten(), c_last.flatten()]))
        results.append((h, h_last.flatten(), c_last.flatten(), grads, [t.grad for t in leaves]))
    want, got = results
    for a, b in (*zip(got[:3], want[:3], strict=True), *zip(got[4], want[4], strict=True)):
        assert_near(a, b)
    assert_near(got[3]["weight_ih"], want[3]["weight_ih_l0"])
    assert_near(got[3]["weight_hh"].flatten(0, 2), want[3]["weight_hh_l0"])
    if bias:
        assert_near(got[3]["bias"].flatten(), want[3]["bias_ih_l0"])


def test_from_torch_copies():
    theirs = nn.LSTM(3, 4)
    ours = xk.nn.LSTM.from_torch(theirs)
    before = ours.weight_ih.clone()
    with torch.no_grad():
        theirs.weight_ih_l0.zero_()
    assert torch.equal(ours.weight_ih, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_layers": 2}, "num_layers=1, got num_layers=2"),
        ({"bidirectional": True}, "bidirectional=False, got bidirectional=True"),
        ({"proj_size": 2}, "proj_size=0, got proj_size=2"),
    ],
)
def test_from_torch_refuses_what_it_cannot_be(options, text):
    with pytest.raises(NotImplementedError, match=f"^LSTM.from_torch: module must have {text}$"):
        xk.nn.LSTM.from_torch(nn.LSTM(3, 4, **options))


def test_from_torch_takes_an_lstm_alone():
    with pytest.raises(
        TypeError, match=r"^LSTM.from_torch: module must be a torch.nn.LSTM, got GRU$"
    ):
        xk.nn.LSTM.from_torch(nn.GRU(3, 4))


# ---------------------------------------------------------------- initialisation


def test_slstm_initialisation():
    torch.manual_seed(0)
    layer = xk.nn.SLSTM(400, 64, 4, block_ratio=0.5)
    assert layer.weight_ih.std().item() == pytest.approx((2 / (5 * 400)) ** 0.5, rel=0.02)
    assert not layer.weight_hh.any()
    i, f, z, o = layer.bias
    assert not i.any() and not z.any() and not o.any()
    want_D = 5 - 12 * (torch.arange(16) / 15) ** (0.3 + 1.3 * 0.5)
    assert torch.allclose(f, want_D.expand(4, 16))
    exponential = xk.nn.SLSTM(400, 64, 4, block_ratio=0.5, forget_gate="exp")
    assert torch.allclose(exponential.bias[1], F.logsigmoid(f))


def test_lstm_initialisation_is_torchs():
    for layer in (xk.nn.LSTM(30, 100), xk.nn.LSTMCell(30, 100)):
        for parameter in layer.parameters():
            assert 0.095 < parameter.abs().max() <= 0.1


@EVERY_LAYER
def test_reset_parameters(name):
    layer = SEQUENCE_LAYERS[name]()
    before = layer.weight_ih.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight_ih, before)
    assert not any(p.isnan().any() for p in layer.parameters())


def test_a_unit_a_head():
    assert xk.nn.SLSTM(3, 4, 4).bias.isfinite().all()


def test_meta_device_and_dtype():
    layer = xk.nn.SLSTM(6, 8, device="meta", dtype=torch.bfloat16)
    assert layer.weight_hh.is_meta and layer.bias.dtype == torch.bfloat16
    layer.to_empty(device="cpu").reset_parameters()
    h, state = layer(torch.randn(2, 3, 6, dtype=torch.bfloat16))
    assert (h.dtype, state.c.dtype) == (torch.bfloat16, torch.float32)


# ---------------------------------------------------------------- torch's machinery


@EVERY_LAYER
def test_copies_and_pickles(name):
    layer = seeded(SEQUENCE_LAYERS[name])
    x = torch.randn(2, 3, 6)
    want, _ = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], want)
        assert repr(twin) == repr(layer)


@pytest.mark.parametrize("make", [xk.nn.SLSTM, xk.nn.LSTM, xk.nn.MLSTM])
def test_states_and_exported_layers_are_saved(make):
    layer, x = seeded(make, 6, 8, 2), torch.randn(2, 5, 6)
    with torch.no_grad():
        _, state = layer(x)
        want, end = layer(x, state)
    exported = torch.export.export(layer, (x, state))
    file, file_of_state = io.BytesIO(), io.BytesIO()
    torch.export.save(exported, file)
    torch.save(state, file_of_state)
    for written in (file, file_of_state):
        written.seek(0)
    read = torch.load(file_of_state, weights_only=True)
    got, got_end = torch.export.load(file).module()(x, read)
    assert_near(got, want)
    assert type(got_end) is type(read) is type(end)
    for a, b in zip(got_end, end, strict=True):
        assert_near(a, b)


@EVERY_LAYER
def test_autocast(name):
    layer = seeded(SEQUENCE_LAYERS[name])
    x = torch.randn(2, 30, 6)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        h, state = layer(x)
    assert (h.dtype, state.c.dtype) == (torch.bfloat16, torch.float32)
    assert_near(h, want, 0.02)
    h.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@EVERY_LAYER
def test_without_gradient(name):
    layer = seeded(SEQUENCE_LAYERS[name])
    x = torch.randn(2, 3, 6)
    want, _ = layer(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            h, state = layer(x)
        assert torch.equal(h, want) and not h.requires_grad and not state.c.requires_grad


@pytest.mark.medium
@EVERY_LAYER
def test_compiles_without_a_recompile_per_shape(name):
    torch.compiler.reset()
    layer = seeded(SEQUENCE_LAYERS[name])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compilations = []
    for B, T in ((2, 5), (2, 6), (3, 7), (4, 9), (5, 30)):
        x = torch.randn(B, T, 6)
        h, state = layer(x)
        want = with_gradients(layer, h) | {"h": h, "c": state.c}
        h, state = compiled(x)
        got = with_gradients(layer, h) | {"h": h, "c": state.c}
        for key in want:
            assert_near(got[key], want[key])
        compilations.append(counter.frame_count)
    # dynamo learns that T varies, then that B does; then it is done.
    assert compilations[2] == compilations[-1]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: xk.nn.SLSTM(6, 8), "SLSTM(6, 8, num_heads=4)"),
        (lambda: xk.nn.LSTM(6, 8), "LSTM(6, 8)"),
        (lambda: xk.nn.LSTMCell(6, 8, bias=False), "LSTMCell(6, 8, bias=False)"),
        (
            lambda: xk.nn.SLSTM(
                *(6, 8, 2, False, False),
                forget_gate="exp",
                n_floor=1.0,
                clip_grad=10.0,
                backend="reference",
            ),
            "SLSTM(6, 8, num_heads=2, bias=False, backend='reference', batch_first=False,"
            " forget_gate='exp', n_floor=1.0, clip_grad=10.0)",
        ),
    ],
)
def test_repr(layer, text):
    assert repr(layer()) == text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: xk.nn.SLSTM(6, 10),
            "SLSTM: hidden_size must be a multiple of num_heads = 4, got 10",
        ),
        (lambda: xk.nn.LSTM(0, 8), "LSTM: input_size must be at least 1, got 0"),
        (lambda: xk.nn.LSTM(6, 8, 0), "LSTM: num_heads must be at least 1, got 0"),
        (
            lambda: xk.nn.SLSTM(6, 8, forget_gate="relu"),
            "SLSTM: forget_gate must be 'sigmoid' or 'exp', got 'relu'",
        ),
        (
            lambda: xk.nn.SLSTM(6, 8, block_ratio=2.0),
            "SLSTM: block_ratio must be within 0 and 1, got 2.0",
        ),
        (
            lambda: xk.nn.SLSTM(6, 8)(torch.zeros(2, 3, 5)),
            "SLSTM: x must be (..., input_size) = (..., 6), got (2, 3, 5)",
        ),
        (
            lambda: xk.nn.SLSTM(6, 8)(torch.zeros(6)),
            "SLSTM: x must be (B, T, input_size) or (T, input_size), got (6,)",
        ),
        (
            lambda: xk.nn.LSTM(6, 8, batch_first=False)(torch.zeros(6)),
            "LSTM: x must be (T, B, input_size) or (T, input_size), got (6,)",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()
