"""Teachers with the hybrid mixer for attention: what it computes, decoding, files, refusals."""

import copy
import doctest
import json
import re
from pathlib import Path

import pytest
import torch
from hybrid_cases import families, hybrid, make_teacher, save_teacher, stir, tokens, transformers
from safetensors.torch import load_file, save_file

import distill
from distill.__main__ import main
from distill.errors import DistillError
from distill.hybrid.options import CHOICES
from xlstm_kernels.testing import relative_error

NO_MLSTM = {"output_gate": "bias", "output_bias": -200.0}


@torch.no_grad()
def test_heads_that_share_a_state(tmp_path):
    teacher, ids = make_teacher(), tokens(24)
    student = stir(hybrid.hybridize(teacher, window=6, grouped_heads="share")).double()
    caches = [student(ids[:, :20]).past_key_values]
    caches.append(hybrid.hybridize(teacher, window=6).double()(ids[:, :20]).past_key_values)
    states = [cache.layers[0].state.mlstm.c for cache in caches]
    assert [state.shape[1] for state in states] == [2, 4]
    assert states[0].untyped_storage().nbytes() == states[0].nbytes, "not a view of all heads'"
    got = student(ids[:, 20:], past_key_values=caches[0]).logits
    assert relative_error(got, student(ids, use_cache=False).logits[:, 20:]) <= 1e-11
    student.float().save_pretrained(tmp_path)
    loaded = hybrid.load_student(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@families
@torch.no_grad()
def test_a_window_over_everything_is_the_teacher(family):
    """Projections, norms, position embedding, scale and the order of heads are the teacher's."""
    teacher, ids = make_teacher(family), tokens(20)
    student = hybrid.hybridize(teacher, window=20, **NO_MLSTM)
    assert relative_error(student(ids).logits, teacher(ids).logits) <= 1e-5


SLIDING = {
    "mistral": {"sliding_window": 5},
    "olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
}


@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_sliding_teacher_and_the_same_window(family):
    teacher = make_teacher(family, **SLIDING[family])
    student = hybrid.hybridize(teacher, window=5, sinks=0, **NO_MLSTM)
    assert relative_error(student(tokens(20)).logits, teacher(tokens(20)).logits) <= 1e-5


@families
@torch.no_grad()
def test_decode_equals_prefill(family):
    student = stir(hybrid.hybridize(make_teacher(family), window=6, sinks=2)).double()
    ids = tokens(24)
    want = student(ids, use_cache=False).logits
    for pieces in ([1] * 24, [3, 1, 8, 1, 11]):
        cache, got = None, []
        for piece in ids.split(pieces, dim=1):
            output = student(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            got.append(output.logits)
        assert relative_error(torch.cat(got, dim=1), want) <= 1e-11


@pytest.mark.parametrize("family", ["llama", "phi3", "smollm3", "gpt2"])
@torch.no_grad()
def test_an_mlstm_without_rotary_position_embedding(family):
    teacher, ids = make_teacher(family).double(), tokens(24)
    student = stir(hybrid.hybridize(teacher, window=6, rotary="window", feature_map="elu"))
    seen = {}
    attention = (student.transformer.h if family == "gpt2" else student.model.layers)[1]
    attention = attention.attn if family == "gpt2" else attention.self_attn
    projection = {"gpt2": "c_attn", "phi3": "qkv_proj"}.get(family, "q_proj")
    module = attention.get_submodule(projection)
    hook = module.register_forward_hook(lambda _, args, output: seen.update(q=output))
    attention.mixer.observer = lambda q, k, scale, inputs, o: seen.update(phi=inputs[0])
    want = student(ids, use_cache=False).logits
    q_BTHD = seen["q"][..., : attention.mixer.head_dim * 4].unflatten(-1, (4, -1))
    assert relative_error(seen["phi"], torch.nn.functional.elu(q_BTHD) + 1) <= 1e-7
    hook.remove()
    attention.mixer.observer = None
    cache = student(ids[:, :20]).past_key_values
    got = [student(x, past_key_values=cache).logits for x in ids[:, 20:].split((1, 3), dim=1)]
    assert relative_error(torch.cat(got, dim=1), want[:, 20:]) <= 1e-9
    both = hybrid.hybridize(teacher, window=6, feature_map="elu")
    both.load_state_dict(student.state_dict())
    same = relative_error(both(ids, use_cache=False).logits, want) <= 1e-9
    assert same == (family == "gpt2")


@families
def test_generate(family):
    student = stir(hybrid.hybridize(make_teacher(family), window=6, sinks=2))
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 12, "do_sample": False}
        got = student.generate(tokens(9), attention_mask=torch.ones(2, 9), **options)
        assert got.shape == (2, 21)
        assert torch.equal(got, student.generate(tokens(9), use_cache=False, **options))


def cache_bytes(cache):
    leaves = torch.utils._pytree.tree_leaves([layer.state for layer in cache.layers])
    return sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))


@torch.no_grad()
def test_the_cache_is_of_constant_size():
    student = hybrid.hybridize(make_teacher(), window=6)
    short, long = (student(tokens(T)).past_key_values for T in (1, 40))
    size = cache_bytes(long)
    assert size == cache_bytes(short) > 0
    after = student(tokens(1), past_key_values=long).past_key_values
    assert after is long
    assert (after.get_seq_length(), cache_bytes(after)) == (41, size)


@pytest.mark.parametrize("family", ["llama", *SLIDING])
@torch.no_grad()
def test_layers_that_stay_attention(family):
    teacher, ids = make_teacher(family, **SLIDING.get(family, {})), tokens(24)
    student = stir(hybrid.hybridize(teacher, window=6, layers=[-1, 0])).double()
    assert [hasattr(layer.self_attn, "mixer") for layer in student.model.layers] == [1, 0, 1]
    want = student(ids, use_cache=False).logits
    cache = student(ids[:, :20]).past_key_values
    got = [student(x, past_key_values=cache).logits for x in ids[:, 20:].split((1, 3), dim=1)]
    assert relative_error(torch.cat(got, dim=1), want[:, 20:]) <= 1e-11
    assert cache.layers[1].keys.shape[2] == (24 if family == "llama" else 4)


@families
@torch.no_grad()
def test_packed_documents_do_not_see_one_another(family):
    student = stir(hybrid.hybridize(make_teacher(family), window=6)).double()
    ids, cu_seqlens = tokens(20, B=1), torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    got = student(ids, cu_seq_lens_q=cu_seqlens).logits
    want = [student(part, use_cache=False).logits for part in ids.split([7, 13], dim=1)]
    assert relative_error(got, torch.cat(want, dim=1)) <= 1e-11


@families
def test_the_teacher_stays_as_it_is(family):
    teacher, ids = make_teacher(family), tokens(9)
    before, weights = teacher(ids).logits, copy.deepcopy(teacher.state_dict())
    kinds, settings = [type(m) for m in teacher.modules()], teacher.config.to_dict()
    student = stir(hybrid.hybridize(teacher, window=3))
    assert [type(m) for m in teacher.modules()] == kinds
    assert teacher.config.to_dict() == settings
    assert torch.equal(teacher(ids).logits, before)
    assert all(torch.equal(x, weights[name]) for name, x in teacher.state_dict().items())
    parameters, new = dict(student.named_parameters()), hybrid.new_parameters(student)
    shared = dict(teacher.named_parameters())
    assert shared.keys() | new.keys() == parameters.keys()
    assert all(parameters[name] is parameter for name, parameter in shared.items())


def test_own_weights():
    teacher = make_teacher().bfloat16()
    student = hybrid.hybridize(teacher, copy_weights=True)
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in student.parameters()}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student(tokens(9)).logits.isfinite().all()


@families
def test_gradients_reach_every_parameter(family):
    student = stir(hybrid.hybridize(make_teacher(family), window=6)).train()
    student(tokens(20), labels=tokens(20)).loss.backward()
    still = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_autocast():
    student = stir(hybrid.hybridize(make_teacher(), window=6))
    exact = student(tokens(20)).logits
    with torch.autocast("cpu", torch.bfloat16):
        cache = student(tokens(20)[:, :19]).past_key_values
        got = student(tokens(20)[:, 19:], past_key_values=cache).logits
        student(tokens(20), labels=tokens(20), use_cache=False).loss.backward()
    assert relative_error(got, exact[:, 19:]) <= 0.05
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("grouped_heads", CHOICES["grouped_heads"])
def test_compiled(grouped_heads):
    """Training is one graph; a decoding step runs."""
    student = stir(hybrid.hybridize(make_teacher(), window=6, grouped_heads=grouped_heads))
    ids = tokens(20)
    want = student(ids, labels=ids, use_cache=False)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    got = compiled(ids, labels=ids, use_cache=False)
    assert relative_error(got.logits, want.logits) <= 1e-5
    grads = [torch.autograd.grad(x.loss, list(student.parameters())) for x in (got, want)]
    assert all(relative_error(a, b) <= 1e-4 for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        cache = student(ids[:, :19]).past_key_values
        step = torch.compile(student, backend="aot_eager")(ids[:, 19:], past_key_values=cache)
    assert relative_error(step.logits, want.logits[:, 19:]) <= 1e-5


def test_recomputed_activations():
    student = stir(hybrid.hybridize(make_teacher(), window=6)).train()
    grads = []
    for recompute in (False, True):
        if recompute:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(tokens(20), labels=tokens(20)).loss.backward()
        grads.append([parameter.grad for parameter in student.parameters()])
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(*grads, strict=True))


@families
@torch.no_grad()
def test_save_and_load(family, tmp_path):
    student = stir(hybrid.hybridize(make_teacher(family), window=6, layers=[0, 2]))
    student.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")), "weights are safetensors"
    for loaded in (
        hybrid.load_student(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is type(student)
        assert loaded.config.hybrid == student.config.hybrid
        assert torch.equal(loaded.eval()(tokens(9)).logits, student(tokens(9)).logits)
        tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert tied == (family in ("gpt2", "qwen2", "smollm3"))


@torch.no_grad()
def test_another_window_than_in_training(tmp_path):
    teacher = make_teacher()
    student = stir(hybrid.hybridize(teacher, window=9))
    student.save_pretrained(tmp_path)
    loaded = hybrid.load_student(tmp_path, window=4).eval()
    want = stir(hybrid.hybridize(teacher, window=4))
    assert loaded.config.hybrid == want.config.hybrid
    assert torch.equal(loaded(tokens(20)).logits, want(tokens(20)).logits)
    with pytest.raises(DistillError, match="window must be a whole number of at least 1, got 0"):
        hybrid.load_student(tmp_path, window=0)


@torch.no_grad()
def test_a_student_from_before_there_were_these_options(tmp_path):
    student = stir(hybrid.hybridize(make_teacher(), window=6))
    student.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    for name in ("grouped_heads", "feature_dim", "rotary"):
        del settings["hybrid"][name]
    file.write_text(json.dumps(settings))
    loaded = hybrid.load_student(tmp_path).eval()
    assert torch.equal(loaded(tokens(9)).logits, student(tokens(9)).logits)


def test_files_that_are_not_a_students(tmp_path):
    teacher = make_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(DistillError, match=r"load_student: model_type .* must be .*got 'llama'"):
        hybrid.load_student(tmp_path / "teacher")
    hybrid.hybridize(teacher).save_pretrained(tmp_path / "student")
    file = tmp_path / "student" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.mixer.feature_k"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DistillError, match=r"missing keys model\.layers\.1\.self_attn\.mixer"):
        hybrid.load_student(tmp_path / "student")
    torch.save(weights, tmp_path / "student" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        hybrid.load_student(tmp_path / "student")
    config = tmp_path / "student" / "config.json"
    changed = json.loads(config.read_text())
    changed["hybrid"]["windwo"] = 7
    config.write_text(json.dumps(changed))
    with pytest.raises(DistillError, match=r"options must be among .*got windwo"):
        hybrid.load_student(tmp_path / "student")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"window": True}, "window must be a whole number of at least 1, got True"),
        ({"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ({"feature_map": "relu"}, "feature_map must be one of softmax, .*got 'relu'"),
        ({"layers": [3]}, "layers must be indices of 3 layers, got 3"),
        ({"layers": ["0"]}, "layers must be indices of 3 layers, got '0'"),
        ({"layers": 0}, "layers must be None or a list, got 0"),
        ({"layers": []}, "layers must be None or name a layer, got none"),
        ({"feature_dim": 0}, "feature_dim must be a whole number of at least 1, got 0"),
        ({"feature_dim": 4, "feature_map": "elu"}, "feature_dim must be None with .*'elu'.* got 4"),
        ({"windows": 8}, "options must be among .*got windows"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(DistillError, match=f"hybridize: {message}"):
        hybrid.hybridize(make_teacher(), **changes)


def test_models_that_are_no_teachers():
    student = hybrid.hybridize(make_teacher())
    for model in (torch.nn.Linear(2, 2), make_teacher().model, student, None):
        with pytest.raises(DistillError, match=r"hybridize: teacher must be a causal .*got"):
            hybrid.hybridize(model)


def test_calls_that_the_mixer_would_not_honour():
    student = hybrid.hybridize(make_teacher())
    padded = torch.ones(2, 9, dtype=torch.int64)
    padded[0, :2] = 0
    with pytest.raises(DistillError, match=r"attention_mask must be .*got zeros"):
        student(tokens(9), attention_mask=padded)
    with pytest.raises(DistillError, match=r"attention_mask must be .*got .*2, 1, 9, 9"):
        student(tokens(9), attention_mask=torch.zeros(2, 1, 9, 9))
    with pytest.raises(DistillError, match="must be a HybridCache, got DynamicCache"):
        student(tokens(9), past_key_values=transformers.DynamicCache())
    with pytest.raises(DistillError, match="use_cache must be False"):
        student(tokens(9, B=1), cu_seq_lens_q=torch.tensor([0, 9]), use_cache=True)
    with pytest.raises(ValueError, match="stateful"):
        student.generate(tokens(9, B=1), assistant_model=make_teacher(), max_new_tokens=2)


def test_the_docstrings_example():
    result = doctest.testmod(hybrid)
    assert result.attempted and not result.failed


def test_the_readmes_example(tmp_path, monkeypatch):
    readme = Path(__file__).parents[2] / "README.md"
    example = re.search(r"```python\n(teacher = transformers\..*?)```", readme.read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    make_teacher().save_pretrained("teacher")
    names = {"distill": distill, "torch": torch, "transformers": transformers}
    exec(example, names | {"batches": [tokens(9, seed=seed) for seed in range(2)]})


@pytest.mark.slow
def test_the_command(tmp_path, corpus_dir, capsys):
    save_teacher(tmp_path / "teacher", corpus_dir)
    flags = ["--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "student")]
    text = ["--corpus", str(corpus_dir), "--pattern", "*.py", "--length", "64"]
    more = ["--window", "8", "--option", "layers=[1]", "--option", "feature_map=elu"]
    assert main(["hybridize", *flags, *text, *more]) == 0
    assert "new parameters" in capsys.readouterr().out
    student = hybrid.load_student(tmp_path / "student")
    assert student.config.hybrid["layers"] == [1]
    assert student.config.hybrid["feature_map"] == "elu"
    forget = student.model.layers[1].self_attn.mixer.gates.bias[2:]
    assert not torch.allclose(forget, torch.tensor([3.0, 6.0]))
    for option, message in (("windwo=8", "got windwo"), ("window=8", "--option: must be as")):
        assert main(["hybridize", *flags, "--option", option]) == 1
        assert message in capsys.readouterr().err
