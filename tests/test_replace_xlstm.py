"""Layers of NX-AI's xlstm and of TiRex replaced: the same numbers from both orders of weights."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import xlstm_kernels as xk
from xlstm_kernels.testing import check_results, relative_error

pytest.importorskip("xlstm", reason="xlstm is not installed: make test-compat")
cell_module = pytest.importorskip("xlstm.blocks.slstm.cell")


def randomised(layer, scale=0.5):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return layer


def slstm_cell(backend="vanilla", function="slstm", **options):
    states = 2 if function == "lstm" else 4
    config = cell_module.sLSTMCellConfig(
        *(12, 3, states, backend, function), dtype="float32", **options
    )
    if backend == "cuda":
        return randomised(cell_module.sLSTMCell_cuda(config, skip_backend_init=True))
    return randomised(cell_module.sLSTMCell_vanilla(config))


def run(cell, with_state, time_first=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn((9, 2, 48) if time_first else (2, 9, 48), generator=draw).to(dtype)
    x.requires_grad_()
    state = None
    if with_state:
        state = torch.randn(cell.config.num_states, 2, 12, generator=draw).to(dtype)
        state[2:3] = state[2:3].abs() + 0.5
        state.requires_grad_()
    y, last = cell(x, state)
    cell.zero_grad()
    (y.sin().sum() + last[:2].cos().sum()).backward()
    results = {"y": y.detach(), "last": last.detach(), "d_x": x.grad}
    if with_state:
        results["d_state"] = state.grad
    return results | {name: p.grad.clone() for name, p in cell.named_parameters()}


@pytest.mark.parametrize("function", ["slstm", "lstm"])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(
    ("input_shape", "output_shape"), [("BSGNH", "BNSH"), ("SBGNH", "SBH"), ("BSGNH", "BSH")]
)
def test_slstm_cell(function, with_state, input_shape, output_shape):
    cell = slstm_cell(function=function, input_shape=input_shape, output_shape=output_shape)
    time_first = input_shape == "SBGNH"
    plain = run(cell, with_state, time_first)
    exact = run(copy.deepcopy(cell).double(), with_state, time_first, torch.float64)
    report = xk.replace_layers(cell)
    assert [row.became for row in report.replaced] == ["FusedsLSTMCell_vanilla"]
    check_results(run(cell, with_state, time_first), exact, iter([plain]))
    xk.restore_layers(cell)
    assert type(cell) is cell_module.sLSTMCell_vanilla


def test_both_orders_of_weights_hold_the_same_cell():
    """What the CUDA cell would compute: the package's own conversion, then its plain torch."""
    cuda, vanilla = slstm_cell("cuda"), slstm_cell("vanilla")
    with torch.no_grad():
        vanilla._recurrent_kernel_.copy_(
            vanilla._recurrent_kernel_ext2int(
                cuda._recurrent_kernel_int2ext(cuda._recurrent_kernel)
            )
        )
        vanilla._bias_.copy_(vanilla._bias_ext2int(cuda._bias_int2ext(cuda._bias)))
    want = run(vanilla, True)
    xk.replace_layers(cuda)
    got = run(cuda, True)
    for name in ("y", "last", "d_x", "d_state"):
        assert relative_error(got[name], want[name]) <= 1e-5
    gradient = vanilla._bias_int2ext(want["_bias_"])
    assert relative_error(cuda._bias_int2ext(got["_bias_"]), gradient) <= 1e-5


def test_a_step_returns_the_new_state_in_float32():
    cell = slstm_cell()
    x = torch.randn(2, 1, 48)
    y, state = cell(x)
    xk.replace_layers(cell)
    stepped, after = cell.step(x, torch.zeros_like(state))
    assert relative_error(stepped, y) <= 1e-6 and relative_error(after, state) <= 1e-6
    assert cell.bfloat16()(x.bfloat16())[1].dtype == torch.float32


def test_cells_that_are_left():
    cut = slstm_cell("cuda", gradient_recurrent_cut=True)
    assert "gradient_recurrent_cut" in xk.replace_layers(cut).left[0].note
    odd = slstm_cell()
    odd.config.num_states = 3
    assert "num_states=3" in xk.replace_layers(odd).left[0].note
    bounded = slstm_cell("cuda", "lstm", gradient_recurrent_clipval=1.0)
    assert "bounds no gradient" in xk.replace_layers(bounded).left[0].note
    assert xk.replace_layers(slstm_cell("cuda", gradient_recurrent_clipval=1.0)).replaced


class Ours(cell_module.sLSTMCell_vanilla):
    def forward(self, input, state=None, lengths=None):
        return super().forward(2 * input, state)


def test_a_subclass_is_left():
    row = xk.replace_layers(Ours(slstm_cell().config)).left[0]
    assert row.note == "a subclass may compute something else"


def make_stack():
    import xlstm

    torch.manual_seed(0)
    config = xlstm.xLSTMBlockStackConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(xlstm.mLSTMLayerConfig(num_heads=2)),
        slstm_block=xlstm.sLSTMBlockConfig(xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=2)),
        context_length=32,
        num_blocks=2,
        embedding_dim=16,
        slstm_at=[1],
    )
    # Larger weights, and the layers magnify rounding: plain torch's error then is luck.
    return randomised(xlstm.xLSTMBlockStack(config), 0.2).eval()


def test_a_stack_of_both_blocks():
    model = make_stack()
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))

    def results(model, x):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        with torch.no_grad():
            state, steps = None, []
            for t in range(5):
                out, state = model.step(
                    x[:, t : t + 1], **({} if state is None else {"state": state})
                )
                steps.append(out)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        return {"y": y.detach(), "steps": torch.cat(steps, 1)} | grads

    plain, unswapped = results(model, x), copy.deepcopy(model)
    exact = results(copy.deepcopy(model).double(), x.double())

    def plains():
        yield plain
        with torch.backends.mkldnn.flags(enabled=False):  # sums in another order
            yield results(unswapped, x)

    state_dict = model.state_dict()
    report = xk.replace_layers(model)
    kinds = sorted(row.became for row in report.replaced)
    assert kinds == ["FusedmLSTMCell", "FusedsLSTMCell_vanilla"]
    check_results(results(model, x), exact, plains())
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    assert list(model.state_dict()) == list(state_dict)
    xk.restore_layers(model)
    assert all(torch.equal(a, plain[n]) for n, a in results(model, x).items())


def test_training_of_a_stack_takes_the_same_course():
    curves = []
    draw = torch.Generator().manual_seed(1)
    x, target = (torch.randn(2, 20, 16, generator=draw) for _ in range(2))
    for fused in (True, False):
        model = make_stack().train()
        if fused:
            xk.replace_layers(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(20):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < curves[0][0]
    assert relative_error(*curves) <= 1e-4


@pytest.mark.medium
def test_a_compiled_stack_and_recomputed_activations():
    model, x = make_stack(), torch.randn(2, 20, 16, requires_grad=True)
    xk.replace_layers(model)
    want = model(x)
    (want_grad,) = torch.autograd.grad(want.square().sum(), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), want) <= 1e-6
    again = checkpoint(model, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(again.square().sum(), x)
    assert torch.equal(again, want) and torch.equal(grad, want_grad)


def test_export_of_a_step():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = make_stack()

        def forward(self, x, state):
            return self.stack.step(x, state=state)

    step, x = Step(), torch.randn(2, 1, 16)
    xk.replace_layers(step)
    with torch.no_grad():
        _, state = step.stack.step(x)
        exported = torch.export.export(step, (x, copy.deepcopy(state)))
        names = {str(node.target) for node in exported.graph.nodes}
        assert any("mlstm_step" in n for n in names) and any("recurrence" in n for n in names)
        want, _ = step(x, copy.deepcopy(state))
        got, _ = exported.module()(x, copy.deepcopy(state))
    assert torch.equal(got, want)


def make_large():
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    config = xLSTMLargeConfig(
        **{"embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": 40},
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        return_last_states=True,
        mode="inference",
    )
    return randomised(xLSTMLarge(config)).eval()


def test_xlstm_large():
    model = make_large()
    ids = torch.randint(0, 40, (2, 37))
    with torch.no_grad():
        want, _ = model(ids)
        report = xk.replace_layers(model)
        assert [row.layer for row in report.replaced] == ["mLSTMBackend"] * 2
        got, _ = model(ids)
        first, state = model(ids[:, :36])
        last, _ = model(ids[:, 36:], state)
    assert relative_error(got, want) <= 1e-4
    assert relative_error(torch.cat([first, last], 1), got) <= 1e-4


@pytest.mark.medium
def test_xlstm_large_compiles_without_a_break():
    """A prompt, a token after it, and a training step."""
    model, ids = make_large(), torch.randint(0, 40, (2, 37))
    xk.replace_layers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want, state = model(ids)
        token, _ = model(ids[:, :1], copy.deepcopy(state))
        got, state = compiled(ids)
        assert relative_error(got, want) <= 1e-6
        assert relative_error(compiled(ids[:, :1], state)[0], token) <= 1e-6
    model.zero_grad()
    compiled(ids)[0].square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= 1e-5, name


def test_tirex_cell():
    cells = pytest.importorskip("tirex.models.slstm.cell", reason="tirex-ts is not installed")
    config = cells.sLSTMBlockConfig(embedding_dim=12, num_heads=3)
    cell = randomised(cells.sLSTMCell(config, "torch"))
    x = torch.randn(2, 9, 48)
    state = torch.randn(4, 2, 12).abs()
    with torch.no_grad():
        want = cell(x, None), cell(x, state)
        cell_of_xlstm = slstm_cell("cuda")
        cell_of_xlstm.load_state_dict(cell.state_dict())
        assert [row.became for row in xk.replace_layers(cell).replaced] == ["FusedsLSTMCell"]
        xk.replace_layers(cell_of_xlstm)
        for given, (y, last) in zip((None, state), want, strict=True):
            got, after = cell(x, given)
            assert got.shape == y.shape and after.shape == last.shape
            assert relative_error(got, y) <= 2e-2
            assert relative_error(after, last) <= 2e-2
            assert torch.equal(got, cell_of_xlstm(x, given)[0])
