"""Smaller students of the teacher's family: what is copied, what computes the same, refusals."""

import copy
import doctest
import sys

import pytest
import torch
from hybrid_cases import (
    VOCAB,
    families,
    hybrid,
    make_teacher,
    save_teacher,
    stir,
    tokens,
    transformers,
)

import distill
from distill.__main__ import main
from distill.errors import DistillError
from distill.losses.module import DistillModule, LossSpec
from distill.models.compression import compress
from xlstm_kernels.testing import relative_error


def sizes(family):
    return {"heads": 2, "ffn": 20} | ({"width": 16} if family == "gpt2" else {"width": 24})


@families
@torch.no_grad()
def test_all_of_a_teacher_is_the_teacher(family):
    teacher, ids = make_teacher(family), tokens(12)
    want = teacher(ids).logits
    ffn = 128 if family == "gpt2" else 48
    student = compress(teacher, layers=3, width=32, heads=4, ffn=ffn, inputs=ids).student
    assert relative_error(student(ids).logits, want) <= 1e-6
    assert not {p.data_ptr() for p in teacher.parameters()} & {
        p.data_ptr() for p in student.parameters()
    }


@families
@torch.no_grad()
def test_fewer_layers_are_the_teachers_without_the_others(family):
    teacher, ids = make_teacher(family), tokens(12)
    student, layer_map, projection = compress(teacher, layers=[0, 2])
    assert (layer_map, projection, student.config.layer_map) == ([0, 2], None, [0, 2])
    without = copy.deepcopy(teacher)
    layers = without.transformer.h if family == "gpt2" else without.model.layers
    del layers[1]
    without.config.num_hidden_layers = 2
    assert relative_error(student(ids).logits, without(ids, use_cache=False).logits) <= 1e-6


@families
def test_a_narrow_student_learns_saves_and_generates(family, tmp_path):
    teacher = make_teacher(family)
    student, layer_map, projection = compress(
        teacher, layers=2, **sizes(family), inputs=[tokens(12), tokens(9)]
    )
    assert layer_map == [0, 2] and projection.shape == (sizes(family)["width"], 32)
    assert student.num_parameters() < 0.6 * teacher.num_parameters()
    student(tokens(9), labels=tokens(9)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(9)).logits, student(tokens(9)).logits)
    assert loaded.config.layer_map == layer_map
    assert student.generate(tokens(9), max_new_tokens=3, do_sample=False).shape == (2, 12)


def dead(teacher, channels=(), heads=(), neurons=()):
    """The same function, with parts that give nothing."""
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            for index in channels:
                if "embed" in name:
                    weight[:, index] = 0
                elif "o_proj" in name or "down_proj" in name:
                    weight[index] = 0
            for layer in teacher.model.layers:
                for index in heads:
                    D = layer.self_attn.head_dim
                    layer.self_attn.o_proj.weight[:, index * D : (index + 1) * D] = 0
                for index in neurons:
                    layer.mlp.down_proj.weight[:, index] = 0
    return teacher


@torch.no_grad()
def centered(teacher, kept):
    """Hidden states have a mean of 0 over all channels, hence over those that are kept."""
    for name, weight in teacher.named_parameters():
        if "embed" in name:
            weight[:, kept] -= weight[:, kept].mean(1, keepdim=True)
        elif "o_proj" in name or "down_proj" in name:
            weight[kept] -= weight[kept].mean(0)
    return teacher


FAMILIES_AND_METHODS = [("llama", "weight"), ("llama", "activation"), ("llama", "svd")]
FAMILIES_AND_METHODS += [("phi3", "activation"), ("phi3", "svd"), ("olmo", "weight")]


@pytest.mark.parametrize(("family", "method"), FAMILIES_AND_METHODS)
@torch.no_grad()
def test_what_does_nothing_goes_first(family, method):
    channels, neurons = (3, 4, 17, 31), (0, 9, 40)
    teacher = dead(make_teacher(family), channels, heads=(0, 1), neurons=neurons)
    if family == "olmo":  # whose norms take a mean out
        centered(teacher, [index for index in range(32) if index not in channels])
    ids = tokens(40)
    student = compress(
        teacher,
        width=28,
        heads=2,
        ffn=45,
        method=method,
        inputs=ids if method != "weight" else None,
    ).student
    assert student.config.num_key_value_heads == 1
    # Beside a mean over other channels the norms' eps counts otherwise: Llama's is 1e-6, else 1e-5.
    budget = 1e-5 if family == "llama" else 1e-4
    assert relative_error(student(ids).logits, teacher(ids).logits) <= budget


@torch.no_grad()
def test_the_principal_directions_lose_less_than_channels():
    """A teacher whose hidden states lie in 24 of 32 dimensions, none of which is a channel."""
    teacher, ids = make_teacher(), tokens(40)
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 24)).Q
    for name, weight in teacher.named_parameters():
        if "embed" in name:
            weight.copy_(weight @ basis @ basis.T)
        elif "o_proj" in name or "down_proj" in name:
            weight.copy_(basis @ basis.T @ weight)
    student, _, projection = compress(teacher, width=24, method="svd", inputs=ids)
    want = teacher(ids, output_hidden_states=True)
    got = student(ids, output_hidden_states=True)
    assert relative_error(got.logits, want.logits) <= 1e-4
    assert relative_error(got.hidden_states[1], want.hidden_states[1] @ projection.T) <= 1e-4
    channels = compress(teacher, width=24, inputs=ids).student
    assert relative_error(channels(ids).logits, want.logits) > 0.1


OPTIONS = [{}, {"output_gate": "x"}, {"grouped_heads": "share"}]


@torch.no_grad()
def test_layers_learn_from_those_that_they_began_as():
    teacher, ids = make_teacher(), tokens(12)
    student = compress(teacher, layers=[1, 2]).student
    losses = [
        DistillModule(student, teacher, [LossSpec("hidden_mse", args={"layers": layers})])
        for layers in ("copied", [[0, 1], [1, 2]])
    ]
    got, want = (module(ids, ids)["hidden_mse"] for module in losses)
    assert torch.equal(got[0], want[0]) and got[1] == want[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_hybrid_student_made_smaller(options, tmp_path):
    teacher = stir(hybrid.hybridize(make_teacher(), window=6, layers=[0, 2], **options))
    dead(teacher, channels=(5, 6), heads=(2, 3), neurons=(1,))
    for layer in (0, 2):
        mixer = teacher.model.layers[layer].self_attn.mixer
        assert mixer.gates.weight.any()
    student = compress(teacher, width=30, heads=2, ffn=47, inputs=tokens(12)).student
    assert relative_error(student(tokens(12)).logits, teacher(tokens(12)).logits) <= 1e-5
    fewer, layer_map, _ = compress(teacher, layers="every-2")
    assert layer_map == [0, 2] and fewer.config.hybrid["layers"] == [0, 1]
    fewer.save_pretrained(tmp_path)
    loaded = hybrid.load_student(tmp_path).eval()
    assert torch.equal(loaded(tokens(9)).logits, fewer(tokens(9)).logits)


@pytest.mark.parametrize(
    ("layers", "layer_map", "kept"),
    [
        (6, "spread", [0, 2, 4, 7, 9, 11]),
        (1, "spread", [0]),
        (4, "uniform", [2, 5, 8, 11]),
        (3, "first", [0, 1, 2]),
        (3, "last", [9, 10, 11]),
        ("every-3", "spread", [0, 3, 6, 9]),
        ("every-3", "uniform", [2, 5, 8, 11]),
        (None, "spread", list(range(12))),
    ],
)
def test_layer_maps(layers, layer_map, kept):
    teacher = make_teacher(num_hidden_layers=12)
    assert compress(teacher, layers=layers, layer_map=layer_map).layer_map == kept


@torch.no_grad()
def test_layers_that_change_nothing_go_first():
    teacher = make_teacher(num_hidden_layers=5)
    for index in (1, 4):
        layer = teacher.model.layers[index]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    student, layer_map, _ = compress(
        teacher, layers=3, layer_map="influence", inputs=tokens(20), method="weight"
    )
    assert layer_map == [0, 2, 3]
    assert relative_error(student(tokens(9)).logits, teacher(tokens(9)).logits) <= 1e-5


@torch.no_grad()
def test_an_xlstm_with_fewer_blocks():
    torch.manual_seed(0)
    config = transformers.xLSTMConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=4, vocab_size=VOCAB, chunk_size=16
    )
    teacher = transformers.xLSTMForCausalLM(config).eval()
    student, layer_map, _ = compress(teacher, layers=2, layer_map="last")
    assert layer_map == [2, 3] and student.config.num_hidden_layers == 2
    theirs = teacher.backbone.blocks[3].state_dict()
    assert all(
        torch.equal(x, theirs[n]) for n, x in student.backbone.blocks[1].state_dict().items()
    )
    assert student(tokens(16), use_cache=False).logits.isfinite().all()
    with torch.no_grad():
        for layer in (teacher.backbone.blocks[n] for n in (0, 2)):
            layer.mlstm_layer.out_proj.weight.zero_()
            layer.ffn.proj_down.weight.zero_()
    changing = compress(teacher, layers=2, layer_map="influence", inputs=tokens(16))
    assert changing.layer_map == [1, 3]
    with pytest.raises(DistillError, match=r"width.* must be None for a teacher of type xlstm"):
        compress(teacher, width=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "layers must be 1 to 3, got 4"),
        ({"layers": [1, 0]}, r"layers must be rising indices of 3 layers, got \[1, 0\]"),
        (
            {"layers": "every-4", "layer_map": "uniform"},
            "layers must be every 3 at most, got every-4",
        ),
        ({"layers": "each-2"}, "layers must be as 'every-2', got 'each-2'"),
        ({"layers": 2, "layer_map": "middle"}, "layer_map must be one of spread, .*'middle'"),
        ({"layers": 2, "layer_map": "influence"}, "inputs must be given for 'influence', got None"),
        ({"width": 33}, "width must be at least 1 and at most 32, got 33"),
        ({"ffn": 0}, "ffn must be at least 1 and at most 48, got 0"),
        ({"heads": 3}, "heads must be a multiple of 2, which share .* got 3"),
        ({"heads": 2, "kv_heads": 3}, "kv_heads must be at most 2, .* got 3"),
        ({"method": "svd"}, "inputs must be given for method 'svd', got None"),
        ({"method": "best"}, "method must be one of weight, activation, svd, got 'best'"),
        ({"width": 30}, "sizes must fit one another, got .*30"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(DistillError, match=f"compress: {message}"):
        compress(make_teacher(), **changes)


def test_models_that_are_no_teachers():
    for model in (torch.nn.Linear(2, 2), None):
        with pytest.raises(DistillError, match=r"compress: teacher must be .*got"):
            compress(model, layers=1)
    with pytest.raises(DistillError, match=r"width must be heads x dimension .* 16, got 24"):
        compress(make_teacher("gpt2"), width=24, heads=2)
    with pytest.raises(DistillError, match="cannot be rotated"):
        compress(make_teacher("olmo2"), width=24, method="svd", inputs=tokens(9))


def test_the_docstrings_example():
    assert distill.compress is compress
    result = doctest.testmod(sys.modules[compress.__module__])
    assert result.attempted and not result.failed


def test_the_command(tmp_path, capsys, corpus_dir):
    save_teacher(tmp_path / "teacher", corpus_dir)
    flags = ["--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "student")]
    more = ["--layers", "1", "--ffn", "24", "--corpus", str(corpus_dir), "--pattern", "*.py"]
    assert main(["compress", *flags, *more]) == 0
    assert "layers 0 of the teacher's" in capsys.readouterr().out
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (1, 24)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "student").eos_token == "<end>"
    assert main(["compress", *flags, "--layers", "1", "--layer-map", "middle"]) == 1
    assert "layer_map must be one of spread" in capsys.readouterr().err
    assert main(["compress", *flags, "--layers", "all"]) == 1
    assert "--layers: must be as 6, every-2 or 0,2,5, got 'all'" in capsys.readouterr().err
    assert main(["compress", *flags[:2], "--out", flags[1], "--layers", "1"]) == 1
    assert "must be another folder" in capsys.readouterr().err
