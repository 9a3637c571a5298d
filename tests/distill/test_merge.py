"""Means of models on disk, and what is refused."""

import json
import shutil

import pytest
import torch
from hybrid_cases import hybrid, make_teacher, save_teacher, stir, tokens, transformers

import distill
from distill.__main__ import main
from distill.data.capture import load_model, load_teacher
from distill.data.corpus import load_corpus
from distill.errors import DistillError
from distill.evaluation.scores import evaluate
from distill.models import merging
from distill.models.merging import merge, sweep


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two that were trained apart: the same model, stirred differently."""
    folders = {}
    for seed, name in enumerate(("math", "code")):
        student = stir(hybrid.hybridize(make_teacher(), window=6, layers=[0, 2]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folders[name] = tmp_path_factory.mktemp(name)
        student.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("shard_bytes", [1 << 30, 9000])
def test_a_merged_model_is_the_mean(experts, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", shard_bytes)
    merged = load_model(merge(experts, {"math": 0.25, "code": 0.75}, out=tmp_path / "merged"))
    files = sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes > 9000)
    a, b = (load_model(folder).state_dict() for folder in experts.values())
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, 0.25 * a[name] + 0.75 * b[name], atol=1e-6), name
    assert merged(tokens(9)).logits.isfinite().all()
    assert distill.merge is merge


def test_configuration_and_tokenizer_come_along_and_nothing_else(experts, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(experts["math"], first)
    kept = ("tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja")
    other = ("optimizer.pt", "weights.pth", "x.pkl", "pytorch_model.bin", "model.py", "x.ckpt")
    for name in (*kept, *other, "pytorch_model.bin.index.json", "checkpoints/a.json"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text("{}")
    merge({"a": first, "b": experts["code"]}, out=tmp_path / "merged")
    own = {path.name for path in experts["math"].iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == own | set(kept)


def test_the_mean_of_one_model_is_the_model(experts, tmp_path):
    again = {"a": experts["math"], "b": experts["math"], "c": experts["math"]}
    want = load_model(experts["math"]).state_dict()
    for weights in ("uniform", {"a": 1.0, "b": 0.0, "c": 0.0}):
        merged = load_model(merge(again, weights, out=tmp_path / "merged"))
        assert all(torch.equal(x, want[name]) for name, x in merged.state_dict().items())


def test_a_sweep_finds_the_weights(experts):
    target = 0.75 * load_model(experts["math"]).lm_head.weight
    target += 0.25 * load_model(experts["code"]).lm_head.weight
    trials = sweep(experts, lambda m: float((m.lm_head.weight - target).norm()), steps=4)
    assert len(trials) == 5
    assert trials[0].weights == {"math": 0.75, "code": 0.25}
    assert trials[0].score == pytest.approx(0, abs=1e-5)
    assert [t.score for t in trials] == sorted(t.score for t in trials)
    assert len(list(merging._splits(4, 3))) == 15


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"math": 0.5}, "'uniform' or a number for each of math, code, got math"),
        ("equal", "'uniform' or a number for each of math, code, got 'equal'"),
        ({"math": 0.5, "code": 0.4}, "at least 0 and sum to 1, got math=0.5, code=0.4"),
        ({"math": 1.5, "code": -0.5}, "at least 0 and sum to 1, got math=1.5, code=-0.5"),
        ({"math": float("nan"), "code": 1.0}, "sum to 1, got math=nan"),
    ],
)
def test_weights_that_do_not_fit(experts, weights, message, tmp_path):
    with pytest.raises(DistillError, match=f"merge: weights must be .*{message}"):
        merge(experts, weights, out=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_models_that_differ(experts, tmp_path):
    make_teacher(intermediate_size=40).save_pretrained(tmp_path / "other")
    other = experts | {"other": tmp_path / "other"}
    with pytest.raises(DistillError, match=r"one architecture: architectures is .* in math and"):
        merge(other, out=tmp_path / "merged")
    plain = {"a": tmp_path / "plain", "b": tmp_path / "other"}
    make_teacher().save_pretrained(plain["a"])
    with pytest.raises(DistillError, match=r"intermediate_size is 48 in a and 40 in b"):
        merge(plain, out=tmp_path / "merged")
    config = json.loads((plain["b"] / "config.json").read_text()) | {"intermediate_size": 48}
    (plain["b"] / "config.json").write_text(json.dumps(config))
    with pytest.raises(DistillError, match=r"down_proj.weight must have one shape, got \(32, 48\)"):
        merge(plain, out=tmp_path / "merged")
    with pytest.raises(DistillError, match="cannot read a model from"):
        merge({"a": tmp_path / "nothing"}, out=tmp_path / "merged")
    with pytest.raises(DistillError, match="at least one model, got none"):
        merge({}, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_the_command(tmp_path, capsys, corpus_dir):
    one = save_teacher(tmp_path / "one", corpus_dir)
    two = save_teacher(tmp_path / "two", corpus_dir)
    worse = load_model(two)
    with torch.no_grad():
        worse.lm_head.weight.mul_(30)
    worse.save_pretrained(two)
    flags = [f"one={one}", f"two={two}", "--out", str(tmp_path / "merged")]
    text = ["--sweep", "1", "--corpus", str(corpus_dir), "--pattern", "*.py"]
    assert main(["merge", *flags, *text]) == 1
    assert "--sweep: at least 2 documents must be held out" in capsys.readouterr().err
    assert main(["merge", *flags, *text, "--heldout-fraction", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "held out 1 for validation" in said and "trial    2/2" in said
    corpus = load_corpus(corpus_dir, "*.py", 0.2)
    found, tokenizer = load_teacher(tmp_path / "merged")
    validation, test = (
        f"{evaluate(found, tokenizer, part).bits_per_byte:.4f} bits per byte"
        for part in corpus.halves
    )
    assert f"1/2  {validation}" in said and f"test     {test}" in said and validation != test
    merged = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(x, merged[n]) for n, x in load_model(one).state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<end>"
    assert main(["merge", *flags, "--weights", "one=x,two=1"]) == 1
    assert "--weights: must be numbers, got 'x'" in capsys.readouterr().err
