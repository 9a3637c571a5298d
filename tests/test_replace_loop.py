"""Hand-written LSTMs: which are recognised, what they compute then, and which are left and why."""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
from layer_cases import Cell, Loop
from torch import nn

import xlstm_kernels as xk
from xlstm_kernels.compat.recognise import Plan, recognise
from xlstm_kernels.testing import relative_error


class TimeFirst(nn.Module):
    """All in one module, time first, state always given; returns h of all steps and a last axis."""

    def __init__(self, inputs, hidden):
        super().__init__()
        self.to_gates, self.recurrent = nn.Linear(inputs, 4 * hidden), nn.Linear(hidden, 4 * hidden)

    def forward(self, tokens, memory):
        h, c = memory
        outputs = []
        for x in tokens:
            o, i, f, g = (self.to_gates(x) + self.recurrent(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return [torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))]


class LastOnly(Loop):
    def forward(self, x):
        return super().forward(x)[1][0]


KNOWN = {
    "torch_order": (lambda: Loop(Cell(6, 8), 8), {}),
    "square": (lambda: Loop(Cell(8, 8, "gofi", bias=False), 8), {"inputs": 8}),
    "lstm_cell": (lambda: Loop(nn.LSTMCell(6, 8), 8), {}),
    "lstm_cell_without_bias": (lambda: Loop(nn.LSTMCell(6, 8, bias=False), 8), {}),
    "time_first": (lambda: TimeFirst(6, 8), {"time_first": True, "stateful": [True]}),
    "last_only": (lambda: LastOnly(Cell(6, 8, "ifog"), 8), {"stateful": [False]}),
}


def leaves_of(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in leaves_of(v)]


def run(layer, stateful, inputs=6, time_first=False, T=11):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn((T, 3, inputs) if time_first else (3, T, inputs), generator=draw)
    x.requires_grad_()
    state = tuple(torch.randn(3, 8, generator=draw).requires_grad_() for _ in "hc")
    got = leaves_of(layer(x, state) if stateful else layer(x))
    layer.zero_grad()
    sum(((k + 1) * t.sin().sum() for k, t in enumerate(got))).backward()
    grads = [x.grad, *([s.grad for s in state] if stateful else [])]
    return [t.detach() for t in got] + grads + [p.grad.clone() for p in layer.parameters()]


def assert_same(got, want, bound=1e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, b) <= bound


@pytest.mark.parametrize("name", KNOWN)
def test_a_loop_is_recognised_and_computes_the_same(name):
    make, form = KNOWN[name]
    torch.manual_seed(0)
    layer = make()
    form = dict(form)
    forms = form.pop("stateful", [False, True])
    want = [run(layer, stateful, **form) for stateful in forms]
    short = [run(layer, stateful, T=2, **form) for stateful in forms]
    own, keys = type(layer), list(layer.state_dict())
    report = xk.replace_layers(layer)
    assert [row.path for row in report.replaced] == [""]
    assert isinstance(layer, own) and list(layer.state_dict()) == keys
    assert_same([t for s in forms for t in run(layer, s, **form)], [t for w in want for t in w])
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert_same(run(again, forms[0], **form), run(layer, forms[0], **form), bound=0)
    # Too short to gain: the loop itself runs.
    assert_same(
        [t for s in forms for t in run(layer, s, T=2, **form)],
        [t for s in short for t in s],
        bound=0,
    )
    assert xk.restore_layers(layer) == [""]
    assert type(layer) is own and "_plan" not in vars(layer)
    assert_same(run(layer, forms[0], **form), want[0], bound=0)


def test_the_kernel_runs_and_the_loop_does_not(monkeypatch):
    layer = Loop(Cell(6, 8), 8)
    xk.replace_layers(layer)
    monkeypatch.setattr(Cell, "forward", lambda *args: pytest.fail("a step ran"))
    layer(torch.randn(2, 9, 6))
    layer(state=None, x=torch.randn(2, 9, 6))


LEFT = {
    "forget gate + 1": (lambda: Loop(Cell(6, 8, forget=1.0), 8), "no LSTM that we know"),
    "clamped": (lambda: Loop(Cell(6, 8, limit=3.0), 8), "differs from an LSTM"),
    "clamped far out": (lambda: Loop(Cell(6, 8, limit=50.0), 8), "differs from an LSTM"),
    "dropout": (lambda: Loop(Cell(6, 8), 8, dropout=0.5), "in training mode"),
    "detached": (lambda: Loop(Cell(6, 8), 8, detach_every=20), "in training mode, 130 steps"),
    "one step": (lambda: Cell(6, 8, "gifo"), "one step is no faster"),
    "a cell of torch": (lambda: nn.LSTMCell(6, 8), "one step is no faster"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_layers_are_left_with_the_reason(name):
    make, why = LEFT[name]
    layer = make()
    row = xk.replace_layers(layer).rows[0]
    assert row.became == "" and why in row.note


class Remembers(Loop):
    def forward(self, x):
        y, self.last = super().forward(x)
        return y


class Residual(Loop):
    def forward(self, x):
        return x + super().forward(x)[0]


@pytest.mark.parametrize(("cls", "why"), [(Remembers, "attributes"), (Residual, "no LSTM")])
def test_a_forward_that_does_more_is_left(cls, why):
    layer = cls(Cell(8, 8), 8)
    row = xk.replace_layers(layer).rows[0]
    assert row.became == "" and why in row.note
    assert not hasattr(layer, "last")


@pytest.mark.parametrize("seed", [96, 100, 193])
def test_gradients_that_float32_has_few_digits_for_are_no_reason_to_leave_a_layer(seed):
    """Of 200 draws those whose float32 gradients, of saturated gates, differ by more than 1e-4."""
    hidden = (3, 8, 16, 6)[seed % 4]
    inputs, cell = (5, 8, 6, 64)[seed % 4], Cell if seed % 2 else nn.LSTMCell
    order = {"order": ("ifgo", "gofi", "oigf")[seed % 3]} if cell is Cell else {}
    assert isinstance(recognise(Loop(cell(inputs, hidden, **order), hidden), seed), Plan)


def test_a_cell_with_hooks_is_left():
    layer = Loop(Cell(6, 8), 8)
    layer.cell.register_forward_hook(lambda *args: None)
    row = xk.replace_layers(layer).rows[0]
    assert row.note == "hooks on cell, which would not run"


def test_unlike_layers_are_not_run():
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            pytest.fail("it ran")

    assert xk.replace_layers(Explodes()).rows == []


def test_recognising_touches_neither_the_layer_nor_the_generator():
    layer = Loop(Cell(6, 8), 8)
    layer.register_forward_hook(lambda *args: pytest.fail("the layer itself ran"))
    torch.manual_seed(0)
    before, want = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    xk.replace_layers(layer, dry_run=True)
    assert torch.equal(torch.get_rng_state(), want)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("cell", [Cell, nn.LSTMCell])
def test_autocast_keeps_the_dtypes(cell, stateful):
    """Autocast rounds products, and the state of a loop stays float32."""
    layer, x = Loop(cell(6, 8), 8), torch.randn(2, 20, 6)
    given = (x, (torch.randn(2, 8), torch.randn(2, 8))) if stateful else (x,)
    exact = leaves_of(layer(*given))
    with torch.autocast("cpu", torch.bfloat16):
        plain = leaves_of(layer(*given))
    xk.replace_layers(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got = leaves_of(layer(*given))
    for name in range(3):
        assert got[name].dtype == plain[name].dtype
        error = relative_error(plain[name], exact[name])
        assert relative_error(got[name], exact[name]) <= 2 * error


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:  # a failure would change what the tests after it compute
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu"), torch.inference_mode, float64_by_default]
)
def test_recognised_whatever_is_in_force(around):
    layer = Loop(Cell(6, 8), 8)
    with around():
        report = xk.replace_layers(layer)
    assert len(report.replaced) == 1


@pytest.mark.medium
def test_compile_and_functional_call():
    layer = Loop(Cell(6, 8, "ogif"), 8)
    x = torch.randn(2, 9, 6)
    changed = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    want = torch.func.functional_call(layer, changed, (x,))[0]
    xk.replace_layers(layer)
    assert relative_error(torch.func.functional_call(layer, changed, (x,))[0], want) <= 1e-5
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x)[0], layer(x)[0]) <= 1e-6


@pytest.mark.parametrize(
    "make", [lambda: Loop(Cell(6, 8, "ogif"), 8), lambda: nn.LSTM(6, 8, batch_first=True)]
)
def test_export(make):
    layer, x = make().eval(), torch.randn(2, 9, 6)
    want = layer(x)[0]
    xk.replace_layers(layer)
    exported = torch.export.export(layer, (x,))
    assert any("recurrence_forward" in str(node.target) for node in exported.graph.nodes)
    assert relative_error(exported.module()(x)[0], want) <= 1e-5


def test_forward_keeps_the_names_of_its_arguments():
    layer, x = Loop(Cell(6, 8), 8), torch.randn(2, 9, 6)
    want = inspect.signature(layer.forward)
    xk.replace_layers(layer)
    assert inspect.signature(layer.forward) == want
    steps = torch.export.Dim("T", min=8, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: steps}})
    longer = torch.randn(2, 30, 6)
    assert relative_error(exported.module()(longer)[0], layer(longer)[0]) <= 1e-6


@pytest.mark.medium
def test_inside_of_a_compiled_model():
    compiled = torch.compile(Loop(Cell(6, 8), 8), backend="eager")
    x = torch.randn(2, 9, 6)
    want = compiled(x)[0]
    assert [row.path for row in xk.replace_layers(compiled).replaced] == ["_orig_mod"]
    assert relative_error(compiled(x)[0], want) <= 1e-5


def test_torch_script_is_left():
    linears = nn.Sequential(nn.Linear(2, 8), nn.Linear(2, 8))
    assert xk.replace_layers(torch.jit.script(linears)).rows == []
