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
from distill.hybrid.mixer import CHOICES, HybridMixer, HybridOptions
from xlstm_kernels.testing import relative_error

NO_MLSTM = {"output_gate": "bias", "output_bias": -200.0}


def mixer_loop(mixer, x, q, k, v, scale):
    """The module's equations, a token and a head at a time."""
    options, (B, T, H, D) = mixer.options, q.shape
    h = torch.zeros_like(q)
    i, f = mixer.gates(x).chunk(2, dim=-1)
    i = i.exp() if options.input_gate == "exp" else i.sigmoid()
    for b in range(B):
        for head in range(H):
            shared, own = head // (H // k.shape[2]), head // (H // mixer.states)
            S, z = torch.zeros(1, D, dtype=q.dtype), torch.zeros(1, dtype=q.dtype)
            for t in range(T):
                q_t, k_t, v_t = q[b, t, head], k[b, t, shared], v[b, t, shared]
                phi_q, phi_k = phi(mixer, "q", q_t, head), phi(mixer, "k", k_t, own)
                S = f[b, t, own].sigmoid() * S + i[b, t, own] * torch.outer(phi_k, v_t)
                z = f[b, t, own].sigmoid() * z + i[b, t, own] * phi_k
                divisor = {"plain": phi_q @ z, "max": max(phi_q @ z, z.new_ones(())), "none": 1}
                seen = [j for j in range(t + 1) if j > t - options.window or j < options.sinks]
                weights = (scale * (k[b, seen, shared] @ q_t)).softmax(-1)
                o = mixer.output_bias[head]
                if options.output_gate != "bias":
                    given = torch.cat((q_t, k_t, v_t)) if options.output_gate == "qkv" else x[b, t]
                    o = o + mixer.output_weight[head] @ given
                o = o.sigmoid()
                h[b, t, head] = o * (phi_q @ S) / divisor[options.normalizer]
                h[b, t, head] += (1 - o) * (weights @ v[b, seen, shared])
    return h


def phi(mixer, name, x, head):
    if mixer.options.feature_map == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    y = x @ getattr(mixer, f"feature_{name}")[head]
    if mixer.options.feature_map == "softmax":
        return y.softmax(-1)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)))


VARIANTS = [
    {},
    *({name: value} for name, values in CHOICES.items() for value in values[1:]),
    {"window": 1, "sinks": 0},
    {"window": 100},
    {"grouped_heads": "share", "feature_map": "softmax_pair", "input_gate": "sigmoid"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_mixer_computes_its_equations(changes):
    torch.manual_seed(0)
    options = HybridOptions(**{"window": 3, "sinks": 2, "eps": 0.0} | changes)
    mixer = stir(HybridMixer(8, 4, 2, 6, options).double())
    inputs = [torch.randn(2, 11, 8), *(torch.randn(2, 11, heads, 6) for heads in (4, 2, 2))]
    inputs = [part.double() for part in inputs]
    with torch.no_grad():
        want = mixer_loop(mixer, *inputs, scale=0.4)
        assert relative_error(mixer(*inputs, scale=0.4), want) <= 1e-12
        prompt, *pieces = zip(*(part.split((1, 9, 1), dim=1) for part in inputs), strict=True)
        h, state = mixer.prefill(*prompt, scale=0.4)
        got = [h]
        for piece in pieces:
            h, state = mixer.step(*piece, state, scale=0.4)
            got.append(h)
    assert relative_error(torch.cat(got, dim=1), want) <= 1e-12


def test_gradients_of_decoding_are_those_of_a_sequence():
    torch.manual_seed(0)
    options = HybridOptions(window=3, sinks=1, grouped_heads="share")
    mixer = stir(HybridMixer(8, 4, 2, 6, options).double())
    inputs = [torch.randn(2, 7, 8), *(torch.randn(2, 7, heads, 6) for heads in (4, 2, 2))]
    inputs = [part.double().requires_grad_() for part in inputs]
    whole = mixer(*inputs, scale=0.4)
    first, *rest = zip(*(part.split((3, 1, 3), dim=1) for part in inputs), strict=True)
    h, state = mixer.prefill(*first, scale=0.4)
    decoded = [h]
    for piece in rest:
        h, state = mixer.step(*piece, state, scale=0.4)
        decoded.append(h)
    weight, wanted = torch.randn_like(whole), [*inputs, *mixer.parameters()]
    want = torch.autograd.grad(whole, wanted, weight)
    got = torch.autograd.grad(torch.cat(decoded, dim=1), wanted, weight)
    assert all(relative_error(a, b) <= 1e-10 for a, b in zip(got, want, strict=True))


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
        ({"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ({"feature_map": "relu"}, "feature_map must be one of softmax, .*got 'relu'"),
        ({"layers": [3]}, "layers must be indices of 3 layers, got 3"),
        ({"layers": ["0"]}, "layers must be indices of 3 layers, got '0'"),
        ({"layers": 0}, "layers must be None or a list, got 0"),
        ({"layers": []}, "layers must be None or name a layer, got none"),
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
