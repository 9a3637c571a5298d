"""The stand-ins for mlstm_kernels and flashrnn: names, layouts and returns; against the packages
themselves where they are installed."""

import inspect
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import xlstm_kernels as xk
from xlstm_kernels.compat import flashrnn as ours_flashrnn
from xlstm_kernels.compat import mlstm_kernels as ours
from xlstm_kernels.testing import relative_error


def head_first_inputs(S=33, state=False):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, requires_grad=True)

    q, k, v = normal(2, 3, S, 8), normal(2, 3, S, 8), normal(2, 3, S, 12)
    inputs = {"q": q, "k": k, "v": v, "i": normal(2, 3, S), "f": normal(2, 3, S)}
    if state:
        inputs["c_initial"], inputs["n_initial"] = normal(2, 3, 8, 12), normal(2, 3, 8)
        inputs["m_initial"] = normal(2, 3, 1)
    return inputs


@pytest.mark.parametrize("name", ours.KERNELS)
def test_sequence_kernels_return_what_the_package_does(name):
    kernel = ours.get_mlstm_kernel(name)
    assert kernel is getattr(ours, kernel.__name__)
    h = kernel(**head_first_inputs(), chunk_size=64, autocast_kernel_dtype=torch.float32)
    assert h.shape == (2, 3, 33, 12)
    again, last = kernel(**head_first_inputs(state=True), return_last_states=True)
    shapes = [part.shape for part in last]
    assert shapes == [(2, 3, 8, 12), (2, 3, 8), (2, 3, 1)][: 2 if "siging" in name else 3]
    (again.sum() + last[0].sum()).backward()


@pytest.mark.parametrize("name", ours.STEP_KERNELS)
def test_steps_go_on_from_a_sequence(name):
    inputs = {key: x.detach() for key, x in head_first_inputs().items()}
    sequence = ours.get_mlstm_sequence_kernel("native_sequence__native")
    want, last = sequence(**inputs, return_last_states=True)
    first = {key: x[:, :, :-1] for key, x in inputs.items()}
    _, (c, n, m) = sequence(**first, return_last_states=True)
    q, k, v = (inputs[key][:, :, -1] for key in "qkv")
    i, f = (inputs[key][:, :, -1:] for key in "if")
    h, after = ours.get_mlstm_step_kernel(name)(q=q, k=k, v=v, i=i, f=f, c=c, n=n, m=m)
    assert relative_error(h, want[:, :, -1]) <= 1e-5
    for got, part in zip(after, last, strict=True):
        assert got.shape == part.shape and relative_error(got, part) <= 1e-5


def test_backend_module():
    backend = ours.mLSTMBackend(ours.mLSTMBackendConfig(mode="inference", return_last_states=False))
    inputs = head_first_inputs(state=True)
    h, last = backend(**inputs)
    again = backend(**inputs, mode="train", return_last_states=False)
    assert torch.equal(h, again) and len(last) == 3
    padded = ours.mLSTMBackendConfig(mode="train_with_padding", return_last_states=False)
    assert ours.mLSTMBackend(padded)(**inputs).shape == h.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.get_mlstm_kernel("chunkwise--fast"), "get_mlstm_kernel: name must be one of"),
        (lambda: ours.get_mlstm_step_kernel("fast"), "got 'fast'"),
        (lambda: ours.mLSTMBackendConfig(mode="train_with_padding"), "return_last_states must be"),
        (
            lambda: ours.mLSTMBackend(ours.mLSTMBackendConfig())(**head_first_inputs(), mode="x"),
            "mLSTMBackend: mode must be",
        ),
    ],
)
def test_mlstm_kernels_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("given", ["c", "n", "m"])
def test_half_a_state_is_refused(given):
    inputs = head_first_inputs(state=True)
    for other in set("cnm") - {given}:
        inputs[f"{other}_initial"] = None
    with pytest.raises(ValueError, match=f"given together, got {given}_initial alone"):
        ours.get_mlstm_kernel("chunkwise--native_autograd")(**inputs)


def given_by_position(kernel, inputs, **given):
    """What the kernel returns for its arguments in their order: those named, others by default."""
    given = inputs | given
    parameters = inspect.signature(kernel).parameters.values()
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return kernel(*(given.get(p.name, p.default) for p in named))


@pytest.mark.parametrize("name", [*ours.KERNELS, *ours.SEQUENCE_KERNELS])
def test_arguments_by_position(name):
    get = ours.get_mlstm_kernel if name in ours.KERNELS else ours.get_mlstm_sequence_kernel
    kernel, inputs = get(name), head_first_inputs(state=True)
    options = {"eps": 1e-3, "return_last_states": True}
    if "siging" in name:
        options["normalize"] = False
    tiles = dict.fromkeys(("chunk_size", "chunk_size_inter", "stable_fgate"), False)
    h, last = given_by_position(kernel, inputs, **tiles, **options)
    want, want_last = kernel(**inputs, **options)
    assert torch.equal(h, want) and all(map(torch.equal, last, want_last))
    with pytest.raises(TypeError, match=f"{kernel.__name__}: at most .* positional arguments"):
        kernel(*inputs.values(), *range(30))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'q'"):
        kernel(*inputs.values(), q=inputs["q"])


@pytest.mark.medium
def test_kernels_compile_without_a_break():
    inputs = head_first_inputs(state=True)
    for name, kernel in ours.KERNELS.items():

        def run(*call, kernel=kernel):
            return kernel(*call, None, None, None, True, 1e-6)

        call = [inputs[argument] for argument in "qkvif"]
        h, last = torch.compile(run, fullgraph=True, backend="eager")(*call)
        want, want_last = run(*call)
        assert torch.equal(h, want) and all(map(torch.equal, last, want_last)), name
        torch._dynamo.reset()


def parameters_of(function):
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def test_against_mlstm_kernels():
    reason = "mlstm_kernels is not installed: make test-compat"
    theirs = pytest.importorskip("mlstm_kernels.torch", reason=reason)
    has_triton = find_spec("triton") is not None
    assert set(theirs.get_available_mlstm_kernels()) <= set(ours.KERNELS)
    assert set(theirs.get_available_mlstm_sequence_kernels()) <= set(ours.SEQUENCE_KERNELS)
    assert set(theirs.get_available_mlstm_step_kernels()) <= set(ours.STEP_KERNELS)
    for kind in ("", "sequence_", "step_"):
        for name in getattr(theirs, f"get_available_mlstm_{kind}kernels")():
            if "triton" in name and not has_triton:
                continue
            get = f"get_mlstm_{kind}kernel"
            kernel, stand_in = getattr(theirs, get)(name), getattr(ours, get)(name)
            assert kernel.__name__ == stand_in.__name__
            assert parameters_of(kernel) == parameters_of(stand_in)
    for name in theirs.get_available_mlstm_kernels():
        if "triton" in name:
            continue
        kernel, stand_in = theirs.get_mlstm_kernel(name), ours.get_mlstm_kernel(name)
        # Theirs are exact through h where autograd differentiates them; `custbw` are not.
        exact = "autograd" in name
        got, want = head_first_inputs(S=64), head_first_inputs(S=64)
        # By position, in the package's own order and with its defaults.
        names = parameters_of(kernel)
        defaults = [p.default for p in inspect.signature(kernel).parameters.values()][5:]
        h = stand_in(*got.values(), *defaults[: len(names) - 5])
        h_theirs = kernel(**want)
        assert relative_error(h, h_theirs) <= 1e-5, name
        h.sin().sum().backward()
        h_theirs.sin().sum().backward()
        for argument in got if exact else ():
            assert relative_error(got[argument].grad, want[argument].grad) <= 1e-4, (name, argument)
    backend = import_module("mlstm_kernels.torch.backend_module")
    fields = list(backend.mLSTMBackendConfig.__dataclass_fields__)
    assert fields == list(ours.mLSTMBackendConfig.__dataclass_fields__)
    assert vars(backend.mLSTMBackendConfig()) == vars(ours.mLSTMBackendConfig())


def test_replacing_a_backend_of_mlstm_kernels():
    backend = pytest.importorskip(
        "mlstm_kernels.torch.backend_module",
        reason="mlstm_kernels is not installed: make test-compat",
    )
    inputs = {key: x.detach() for key, x in head_first_inputs(S=37, state=True).items()}
    layer = backend.mLSTMBackend(backend.mLSTMBackendConfig(mode="inference", chunk_size=16))
    h, last = layer(**inputs)
    assert [row.became for row in xk.replace_layers(layer).replaced] == ["FusedmLSTMBackend"]
    got, got_last = layer(**inputs)
    assert relative_error(got, h) <= 1e-5
    for part, want in zip(got_last, last, strict=True):
        assert part.shape == want.shape and relative_error(part, want) <= 1e-5


def test_a_subclass_of_a_backend_is_left():
    """By another class, whatever its name."""
    backend = pytest.importorskip(
        "mlstm_kernels.torch.backend_module",
        reason="mlstm_kernels is not installed: make test-compat",
    )

    class Scaled(backend.mLSTMBackend):
        def forward(self, q, *args, **kwargs):
            return super().forward(2 * q, *args, **kwargs)

    Scaled.__name__ = "mLSTMBackend"
    row = xk.replace_layers(Scaled(backend.mLSTMBackendConfig())).left[0]
    assert row.note == "a subclass may compute something else"


def flashrnn_inputs(function, state):
    draw = torch.Generator().manual_seed(0)
    S = 2 if function == "lstm" else 4

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    inputs = {"Wx": normal(2, 9, 4, 3, 8), "R": normal(4, 3, 8, 8) / 3, "b": normal(4, 3, 8)}
    if state:
        inputs["states"] = normal(S, 2, 1, 3, 8)
        inputs["states"][2:3] = 1 + inputs["states"][2:3].abs()
    return {name: x.requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("function", ours_flashrnn.FUNCTIONS)
@pytest.mark.parametrize("state", [True, False])
def test_flashrnn_layouts(function, state):
    S = 2 if function == "lstm" else 4
    inputs = flashrnn_inputs(function, state)
    h, last = ours_flashrnn.flashrnn(**inputs, function=function, backend="vanilla")
    assert h.shape == (1, 2, 9, 3, 8) and last.shape == (S, 2, 1, 3, 8)
    assert torch.equal(h[0, :, -1], last[0, :, 0])
    config = ours_flashrnn.FlashRNNConfig(
        function=function, input_shape="TBGHD", output_shape="STBHD"
    )
    inputs["Wx"] = inputs["Wx"].transpose(0, 1)
    if state:
        inputs["states"] = inputs["states"].transpose(1, 2)
    turned, turned_last = ours_flashrnn.flashrnn(**inputs, config=config)
    assert torch.equal(turned, h.transpose(1, 2)) and torch.equal(turned_last, last.transpose(1, 2))


@pytest.mark.parametrize("function", ours_flashrnn.FUNCTIONS)
def test_flashrnn_every_state(function):
    """All states of all steps, in any layout: h is the call's without them, the last step the last
    state; gradients of h and of the last states too."""
    inputs = flashrnn_inputs(function, True)
    config = ours_flashrnn.FlashRNNConfig(function=function, output_shape="BTSHD")
    inputs["states"] = inputs["states"].permute(1, 2, 0, 3, 4).detach().requires_grad_()
    results = []
    for every_state in (False, True):
        steps, last = ours_flashrnn.flashrnn(**inputs, config=config, every_state=every_state)
        (steps[:, :, 0].sin().sum() + last.cos().sum()).backward()
        results.append([steps[:, :, 0], last, *(x.grad for x in inputs.values())])
        for x in inputs.values():
            x.grad = None
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and relative_error(got, want) <= 1e-5
    assert steps.shape == (2, 9, config.num_states, 3, 8) and torch.equal(steps[:, -1:], last)
    half = {name: x.bfloat16() for name, x in inputs.items()}
    steps, last = ours_flashrnn.flashrnn(**half, config=config, every_state=True)
    assert steps.dtype == torch.bfloat16 and last.dtype == torch.float32
    half["Wx"] = half["Wx"][:, :0]
    steps, last = ours_flashrnn.flashrnn(**half, config=config, every_state=True)
    assert steps.shape == (2, 0, config.num_states, 3, 8)
    assert torch.equal(last, half["states"].float())


@pytest.mark.parametrize("function", ours_flashrnn.FUNCTIONS)
@pytest.mark.parametrize("state", [True, False])
def test_against_flashrnn(function, state):
    theirs = pytest.importorskip("flashrnn", reason="flashrnn is not installed: make test-compat")
    results = []
    for run, options in ((ours_flashrnn.flashrnn, {"every_state": True}), (theirs.flashrnn, {})):
        inputs = flashrnn_inputs(function, state)
        call = inputs | options
        steps, last = run(**call, function=function, backend="vanilla", dtype="float32")
        (sum(part.sin().sum() for part in steps) + last.cos().sum()).backward()
        results.append([*steps, last, *(x.grad for x in inputs.values())])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and relative_error(got, want) <= 1e-5
    h, _ = ours_flashrnn.flashrnn(**flashrnn_inputs(function, state), function=function)
    assert relative_error(h[0], results[1][0]) <= 1e-5
    # Ours after theirs, where no call of theirs reaches.
    names = parameters_of(theirs.flashrnn)
    assert parameters_of(ours_flashrnn.flashrnn) == [*names, "every_state"]
    fields = [name for name in theirs.FlashRNNConfig.__dataclass_fields__ if name[0] != "_"]
    assert fields == list(ours_flashrnn.FlashRNNConfig.__dataclass_fields__)


@pytest.mark.medium
@pytest.mark.parametrize("every_state", [False, True])
def test_flashrnn_compiles_without_a_break(every_state):
    inputs = flashrnn_inputs("slstm", True)

    def run(**inputs):
        return ours_flashrnn.flashrnn(**inputs, function="slstm", every_state=every_state)

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        steps, last = call(**inputs)
        gradients = torch.autograd.grad(steps.sin().sum() + last.sum(), list(inputs.values()))
        results.append([steps, last, *gradients])
    assert all(map(torch.equal, *results))


def test_flashrnn_layouts_of_weights():
    inputs = flashrnn_inputs("slstm", False)
    want, _ = ours_flashrnn.flashrnn(**inputs, function="slstm")
    inputs["R"], inputs["b"] = inputs["R"].permute(1, 3, 0, 2), inputs["b"].permute(1, 2, 0)
    config = ours_flashrnn.FlashRNNConfig(
        function="slstm", recurrent_shape="HPGD", bias_shape="HDG"
    )
    assert torch.equal(ours_flashrnn.flashrnn(**inputs, config=config)[0], want)


def test_flashrnn_initial_values_and_clipping():
    inputs = flashrnn_inputs("slstm", False)
    flash, Config = ours_flashrnn.flashrnn, ours_flashrnn.FlashRNNConfig
    filled = flash(**inputs, config=Config(function="slstm", initial_val=(0.5, 0, 1.0, 0)))[1]
    given = torch.tensor([0.5, 0, 1.0, 0]).view(4, 1, 1, 1, 1).expand(4, 2, 1, 3, 8)
    assert torch.equal(flash(**inputs, states=given, function="slstm")[1], filled)
    clipped = Config(function="slstm", gradient_recurrent_clipval=0.01)
    h, _ = flash(**inputs, config=clipped)
    assert torch.equal(h, flash(**inputs, function="slstm")[0])
    h.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"function": "gru"}, NotImplementedError, "no kernel for function='gru'"),
        ({"function": "rnn"}, ValueError, "function must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"gradient_recurrent_cut": True}, NotImplementedError, "gradient_recurrent_cut"),
        ({"forward_clipval": 1.0}, NotImplementedError, "forward_clipval must be None"),
        ({"input_shape": "BTHGD"}, ValueError, "input_shape must be"),
        ({"output_shape": "BTHD"}, ValueError, "output_shape must be the letters SBTHD"),
        ({"recurrent_shape": "GHDE"}, ValueError, "recurrent_shape must be the letters GHDP"),
        ({"bias_shape": "G"}, ValueError, "bias_shape must be the letters GHD"),
        ({"constants": {"x": 1.0}}, NotImplementedError, "constants must be empty"),
    ],
)
def test_flashrnn_refuses(options, error, message):
    with pytest.raises(error, match=message):
        ours_flashrnn.FlashRNNConfig(**options)


def test_flashrnn_refuses_states_of_another_cell():
    inputs = flashrnn_inputs("slstm", True)
    with pytest.raises(ValueError, match=r"states must have S = 2 and T = 1 .* \(4, 2, 1, 3, 8\)"):
        ours_flashrnn.flashrnn(**inputs, function="lstm")
    with pytest.raises(ValueError, match=r"slstm: r must be .* got \(4, 8, 8\)"):
        ours_flashrnn.flashrnn(**inputs | {"R": inputs["R"][:, 0]}, function="slstm")
    with pytest.raises(ValueError, match=r"flashrnn: R must be GHPD, got \(4, 8, 8\)"):
        config = ours_flashrnn.FlashRNNConfig(function="slstm", recurrent_shape="GHPD")
        ours_flashrnn.flashrnn(**inputs | {"R": inputs["R"][:, 0]}, config=config)
    with pytest.raises(ValueError, match=r"states must have S = 4 and T = 1 .* got \(4, 2\)"):
        states = inputs["states"][:, :, 0, 0, 0]
        ours_flashrnn.flashrnn(**inputs | {"states": states}, function="slstm")
    with pytest.raises(NotImplementedError, match="gradient_recurrent_clipval must be None"):
        config = ours_flashrnn.FlashRNNConfig(gradient_recurrent_clipval=1.0)
        ours_flashrnn.flashrnn(**flashrnn_inputs("lstm", False), config=config)
