"""Rows of attention against what transformers returns and what the mixer computes, and the loss."""

import itertools

import pytest
import torch
from hybrid_cases import families, hybrid, make_teacher, stir, tokens

from distill.errors import DistillError
from distill.hybrid.attention import Rows
from distill.losses.module import DistillModule, LossSpec
from distill.losses.taps import Run, Wanted
from distill.models import recurrent
from xlstm_kernels.testing import relative_error

EVERY_LAYER = frozenset(range(3))


def rows_of_attention(model, ids, rows, part="mixer", **inputs):
    run = Run(model, ids, inputs, Wanted(attention=EVERY_LAYER))
    return [run.attention[at].weights(rows, part) for at in range(3)]


@families
@torch.no_grad()
def test_rows_are_those_of_transformers(family):
    teacher, ids = make_teacher(family).double(), tokens(20)
    rows = Rows.sample(ids, 7, None)
    got = rows_of_attention(teacher, ids, rows)
    teacher.set_attn_implementation("eager")
    want = teacher(ids, output_attentions=True, use_cache=False).attentions
    for weights, matrix in zip(got, want, strict=True):
        assert relative_error(weights, rows.of(matrix.transpose(1, 2)).transpose(1, 2)) <= 1e-6


@torch.no_grad()
def test_rows_are_anywhere_and_a_sequences_own():
    ids = torch.cat([tokens(50, B=1, seed=seed) for seed in range(40)])
    rows = Rows.sample(ids, 8, None)
    assert rows.t_BR.shape == (40, 8) and rows.t_BR.max() < 50
    assert len(rows.t_BR.unique()) > 40
    assert (rows.t_BR.diff(dim=1) > 0).all()
    assert torch.equal(rows.t_BR[3:5], Rows.sample(ids[3:5], 8, None).t_BR)
    assert torch.equal(Rows.sample(ids, 99, None).t_BR[0], torch.arange(50))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_gate": "sigmoid", "feature_map": "elu", "output_gate": "bias"},
        {"feature_map": "softmax_pair", "sinks": 0},
    ],
)
@torch.no_grad()
def test_rows_of_the_mixer_give_its_output(options, packed):
    """A row times the values is what the mixer computes, of documents each for itself."""
    student = stir(hybrid.hybridize(make_teacher(), window=4, eps=1e-12, **options)).double()
    ids = tokens(20, B=1)
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32) if packed else None
    inputs = {"cu_seq_lens_q": cu_seqlens} if packed else {}
    seen = []
    hooks = [
        layer.self_attn.mixer.register_forward_hook(lambda _, args, h: seen.append((args[3], h)))
        for layer in student.model.layers
    ]
    rows = Rows.sample(ids, 20, cu_seqlens)
    for weights, (v_BTGD, h_BTHD) in zip(
        rows_of_attention(student, ids, rows, **inputs), seen, strict=True
    ):
        v_BTHD = v_BTGD.repeat_interleave(2, dim=2)
        assert relative_error(torch.einsum("bhrt,bthd->brhd", weights, v_BTHD), h_BTHD) <= 1e-5
        assert relative_error(weights.sum(-1), torch.ones(1, 4, 20).double()) <= 1e-6
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("part", ["mixer", "mlstm"])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_loss_against_plain_torch(kind, part):
    teacher, ids = make_teacher().double(), tokens(20)
    student = stir(hybrid.hybridize(teacher, window=4, copy_weights=True)).double()
    labels = ids.clone()
    labels[0, :9] = -100
    args = {"kind": kind, "part": part, "rows": 20, "layers": [[0, 0], [2, 1]]}
    module = DistillModule(student, teacher, [LossSpec("attention", args=args)])
    total, count = module(ids, labels)["attention"]
    total.backward()
    got = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    counts = torch.cat([labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    rows = Rows.sample(ids, 20, None)
    p = [x.detach() for x in rows_of_attention(teacher, ids, rows)]
    run = Run(student, ids, {}, Wanted(attention=EVERY_LAYER), grad=True)
    want = 0.0
    for s, t in args["layers"]:
        q = run.attention[s].weights(rows, part)
        error = (
            torch.xlogy(p[t], p[t] / q.masked_fill(q == 0, 1)) if kind == "kl" else (q - p[t]) ** 2
        )
        want = want + (error.sum(-1) * counts[:, None]).sum()
    assert count == counts.sum() * 4 * 2
    assert relative_error(total, want) <= 1e-6
    want.backward()
    for name, grad in got.items():
        assert relative_error(grad, student.get_parameter(name).grad) <= 1e-5, name
    assert (part == "mixer") == ("model.layers.2.self_attn.mixer.output_bias" in got)


def test_a_student_with_fewer_heads_learns_their_mean():
    teacher = make_teacher()
    student = make_teacher(num_attention_heads=2, num_hidden_layers=1)
    module = DistillModule(student, teacher, [LossSpec("attention", args={"layers": "last"})])
    total, count = module(tokens(20), tokens(20))["attention"]
    total.backward()
    assert count == 38
    assert student.model.layers[0].self_attn.q_proj.weight.grad.norm() > 0


def test_the_model_is_as_before_and_checkpoints_look_once():
    student = stir(hybrid.hybridize(make_teacher(), window=4, layers=[0, 1], copy_weights=True))
    module = DistillModule(student.train(), make_teacher(), [LossSpec("attention")])
    config = student.model.layers[2].self_attn.config
    want = module(tokens(20), tokens(20))["attention"][0]
    want.backward()
    grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    student.activation_checkpointing_enable({"use_reentrant": False})
    total = module(tokens(20), tokens(20))["attention"][0]
    total.backward()
    assert torch.equal(total, want)
    again = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
    assert student.model.layers[2].self_attn.config is config
    assert not any(hasattr(x, "tap") for x in student.modules())
    student.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(DistillError, match="must be without use_reentrant"):
        module(tokens(20), tokens(20))
    assert all(layer.self_attn.mixer.observer is None for layer in student.model.layers[:2])


def test_models_run_under_autocast_and_rows_do_not():
    student = stir(hybrid.hybridize(make_teacher(), window=4, copy_weights=True))
    module = DistillModule(student, make_teacher(), [LossSpec("attention")])
    dtypes = []
    for model in (student, module.teacher):
        query = model.model.layers[0].self_attn.q_proj
        query.register_forward_hook(lambda _, args, q: dtypes.append(q.dtype))
    want, _ = module(tokens(20), tokens(20))["attention"]
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = module(tokens(20), tokens(20))["attention"]
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert got.dtype == torch.float32 and relative_error(got, want) <= 0.05


def test_long_memories_keep_their_digits():
    """Decays far from the beginning, where a difference of running sums has none left."""
    teacher = make_teacher()
    student = hybrid.hybridize(teacher, window=4, forget_bias=-8.0, gate_init="constant")
    ids = tokens(1000, B=1)
    rows = Rows.sample(ids, 8, None)
    with torch.no_grad():
        got, want = (
            rows_of_attention(model, ids, rows, "mlstm") for model in (student, student.double())
        )
    for a, b in itertools.zip_longest(got, want):
        assert relative_error(a, b) <= 1e-4


def test_calls_that_cannot_be():
    config = recurrent.SLSTMConfig(vocab_size=60, hidden_size=32, intermediate_size=48)
    with pytest.raises(DistillError, match="loss attention: models must be of type"):
        DistillModule(recurrent.SLSTMForCausalLM(config), make_teacher(), [LossSpec("attention")])
    student, teacher = make_teacher(), make_teacher()
    for args, message in (
        ({"kind": "l1"}, "kind must be 'kl' or 'mse'"),
        ({"part": "window"}, "part must be one of"),
    ):
        if "part" in args:
            student = hybrid.hybridize(teacher, window=4, copy_weights=True)
        with pytest.raises(DistillError, match=message):
            DistillModule(student, teacher, [LossSpec("attention", args=args)])(
                tokens(9), tokens(9)
            )
