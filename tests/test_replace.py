"""replace_layers and restore_layers on a model: what changes, what does not, what is refused."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import xlstm_kernels as xk
from xlstm_kernels.testing import relative_error


class Model(nn.Module):
    """Layers that we know at several depths, one of them twice."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(6, 8, num_layers=2, batch_first=True, dropout=0.5)
        self.mix = nn.ModuleList(
            [nn.LSTM(8, 8, bidirectional=True, batch_first=True), nn.GRU(8, 8)]
        )
        self.again = self.mix[0]
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.mix[0](self.encoder(x)[0])[0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x():
    return torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(1))


def results(model, x):
    """Output and gradients, at a fixed seed of the dropout."""
    model.zero_grad()
    torch.manual_seed(2)
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(got, want, bound=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) <= bound, name


@pytest.mark.parametrize("training", [True, False])
def test_a_replaced_model_computes_the_same_and_is_restored(model, x, training):
    model.train(training)
    want = results(model, x)
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    state, attributes = model.state_dict(), [set(vars(m)) for m in model.modules()]
    report = xk.replace_layers(model)
    assert [row.path for row in report.replaced] == ["encoder", "mix.0", "again"]
    assert isinstance(model.encoder, nn.LSTM) and type(model.encoder) is not nn.LSTM
    assert_same(results(model, x), want)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state) and model.encoder.training is training
    assert xk.restore_layers(model) == ["encoder", "mix.0"]
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert_same(results(model, x), want, bound=0)


def test_report_is_a_table_with_reasons(model):
    report = xk.replace_layers(model)
    lines = str(report).splitlines()
    assert re.match(r"layer +class +became +backend +which", lines[0])
    assert re.match(r"encoder +LSTM +FusedLSTM +cpu +up to 8 sequences at once", lines[1])
    assert re.match(r"mix.1 +GRU +- +- +no kernel for this cell", lines[3])
    assert re.match(r"again +LSTM +FusedLSTM +cpu +the same layer as mix.0", lines[4])
    assert len(report.rows) == 4
    again = xk.replace_layers(model)
    assert [row.note for row in again.left][:2] == ["replaced before"] * 2
    assert str(xk.replace_layers(nn.Linear(2, 2))) == "no layer that we know"


def test_dry_run_changes_nothing(model):
    report = xk.replace_layers(model, dry_run=True)
    assert len(report.replaced) == 3
    assert type(model.encoder) is nn.LSTM


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"only": "encoder"}, ["encoder"]),
        ({"only": "mix.*"}, ["mix.0"]),
        ({"only": nn.LSTM, "exclude": "mix.*"}, ["encoder"]),
        ({"only": [nn.GRU, "enc*"]}, ["encoder"]),
        ({"exclude": nn.LSTM}, []),
        ({"exclude": "again"}, ["encoder"]),
    ],
)
def test_only_and_exclude(model, options, paths):
    assert [row.path for row in xk.replace_layers(model, **options).replaced] == paths


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: xk.replace_layers(m, only="decoder"), ValueError, "only must fit .* 'decoder'"),
        (lambda m: xk.replace_layers(m, exclude=[3]), TypeError, "exclude must be patterns"),
        (lambda m: xk.replace_layers(m, dry_run=1), TypeError, "dry_run must be a bool, got int"),
        (lambda m: xk.replace_layers("m"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda m: xk.restore_layers(3), TypeError, "model must be a torch.nn.Module, got int"),
    ],
)
def test_bad_arguments(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


def test_what_cannot_be_replaced_is_left_with_the_reason():
    class Sub(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0] + 1

    half = nn.LSTM(4, 4)
    half.weight_hh_l0 = nn.Parameter(half.weight_hh_l0.to("meta"))
    model = nn.ModuleDict(
        {
            "sub": Sub(4, 4),
            "partly": half,
            "meta": nn.LSTM(4, 4, device="meta"),
            "in64": nn.LSTM(4, 4, dtype=torch.float64),
            "projected": nn.LSTM(4, 400, proj_size=2),
        }
    )
    wrapped = nn.LSTM(4, 4)
    wrapped.forward = wrapped.forward  # as accelerate does
    model["wrapped"] = wrapped
    notes = {row.path: row.note for row in xk.replace_layers(model).left}
    assert "subclass" in notes["sub"]
    assert "was set on the object" in notes["wrapped"]
    assert notes["partly"] == "some of its parameters are on the meta device"
    assert "meta" in notes["meta"]
    assert "float64" in notes["in64"]
    assert "a projection from 400 to 2" in notes["projected"]
    assert type(model["sub"]) is Sub


def test_hooks_keep_running(model, x):
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    xk.replace_layers(model)
    model(x)
    assert seen == [(3, 9, 8)]


def test_copies_and_pickles_stay_replaced(model, x):
    xk.replace_layers(model)
    want = results(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(results(again, x), want, bound=0)
        assert xk.restore_layers(again) == ["encoder", "mix.0"]
        assert type(again.encoder) is nn.LSTM


def test_checkpoints_go_both_ways(model, x):
    torch.manual_seed(5)
    other = Model()
    xk.replace_layers(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert_same(results(model, x), results(other, x))
    model.load_state_dict(other.state_dict())


def test_functional_call_sees_the_given_parameters(model, x):
    model.eval()
    changed = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    want = torch.func.functional_call(model, changed, (x,))
    xk.replace_layers(model)
    assert relative_error(torch.func.functional_call(model, changed, (x,)), want) <= 1e-5


def test_recomputed_activations(model, x):
    """Dropout between layers among them, which is to be drawn alike both times."""
    xk.replace_layers(model)
    want = results(model, x)

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    got = results(Recomputed(), x)
    assert_same({name.removeprefix("model."): t for name, t in got.items()}, want, bound=0)


@pytest.mark.medium
@pytest.mark.parametrize("allow_rnn", [True, False])
def test_torch_compile_of_a_replaced_model(model, x, allow_rnn):
    """torch.compile breaks the graph at every nn.LSTM unless it is told to try."""
    xk.replace_layers(model)
    model.eval()
    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=allow_rnn)
        assert relative_error(compiled(x), model(x)) <= 1e-6
        want = results(model, x)
        got = results(compiled, x)
        assert_same({name.removeprefix("_orig_mod."): t for name, t in got.items()}, want)


def test_training_takes_the_same_course(model, x):
    target = torch.randn(3, 9, 3)
    curves = []
    for replaced in (False, True):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
        if replaced:
            xk.replace_layers(trained)
        torch.manual_seed(3)
        losses = []
        for _ in range(20):
            loss = (trained(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert relative_error(curves[1], curves[0]) <= 1e-4


def test_a_class_changed_since_is_not_restored(model):
    xk.replace_layers(model)
    model.encoder.__class__ = type("Other", (type(model.encoder),), {})
    with pytest.raises(ValueError, match="restore_layers: encoder must have the class"):
        xk.restore_layers(model)


def test_layers_moved_off_the_cpu_run_their_own_code(model, x):
    """The meta device stands for any other."""
    xk.replace_layers(model)
    assert model.to("meta")(x.to("meta")).shape == (3, 9, 3)
    assert "no measured kernel" in xk.replace_layers(nn.LSTM(4, 4, device="meta")).left[0].note
