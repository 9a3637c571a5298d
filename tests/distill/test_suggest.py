"""Pairs and shapes from configurations alone, counted as the models themselves are."""

import json

import pytest
import torch
from hybrid_cases import hybrid, make_teacher, save_teacher, transformers

import distill
from distill.__main__ import main
from distill.data.capture import load_model
from distill.errors import DistillError
from distill.evaluation.bench import held_bytes
from distill.models.recurrent import SLSTMConfig, SLSTMForCausalLM
from distill.models.suggestion import folders_of, state_bytes, suggest

CONTEXT = 24


def models():
    teacher = make_teacher()
    yield teacher
    yield hybrid.hybridize(teacher, window=6, sinks=2)
    yield hybrid.hybridize(teacher, window=6, sinks=2, layers=[1], feature_map="softmax_pair")
    yield hybrid.hybridize(teacher, window=6, sinks=2, grouped_heads="share")
    yield make_teacher("gpt2")
    yield SLSTMForCausalLM(SLSTMConfig(vocab_size=60, hidden_size=32)).eval()


@pytest.mark.parametrize("at", range(6))
@torch.no_grad()
def test_states_are_as_large_as_what_models_keep(at):
    model = list(models())[at]
    model.config.dtype = model.dtype
    cache = model(torch.randint(60, (1, CONTEXT)), use_cache=True).past_key_values
    kept = held_bytes(cache)
    # A window counts its tokens beside them.
    assert 0 <= kept - state_bytes(model.config, CONTEXT) <= 3 * 200


def test_pairs_of_one_tokenizer_come_first(tmp_path, corpus_dir, capsys):
    save_teacher(tmp_path / "small", corpus_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    for name, sizes, words in (("large", {"num_hidden_layers": 4}, 0), ("foreign", {}, 3)):
        made = make_teacher(vocab_size=300, **sizes)
        made.save_pretrained(tmp_path / name)
        tokenizer.add_tokens([f"word{n}" for n in range(words)])
        tokenizer.save_pretrained(tmp_path / name)
    pairs = suggest(folders_of(tmp_path), tokens=1000, context=CONTEXT)
    names = [(pair.teacher.name, pair.student.name) for pair in pairs]
    assert ("large", "small") in names and ("small", "large") not in names
    assert ("large", "large: hybrid, every second layer") in names
    kinds = [pair.same_tokenizer for pair in pairs]
    assert kinds == sorted(kinds, reverse=True) and not all(kinds)
    flops = [pair.flop for pair in pairs if pair.same_tokenizer]
    assert flops == sorted(flops)
    small = next(pair for pair in pairs if pair.student.name == "small")
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").num_parameters()
    assert small.student.parameters == want
    assert small.flop == 1000 * (6 * want + 2 * small.teacher.parameters)
    limited = suggest(folders_of(tmp_path), context=CONTEXT, max_parameters=want)
    assert {pair.student.parameters <= want for pair in limited} == {True}
    listed = tmp_path / "models.yaml"
    listed.write_text("[large, small]\n")
    assert main(["suggest", str(listed), "--context", "64"]) == 0
    shown = capsys.readouterr().out
    assert "every" in shown and "same" in shown
    listed.write_text("large\n")
    with pytest.raises(DistillError, match="must be a list of folders, got 'large'"):
        folders_of(listed)
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(DistillError, match="the state of models of type mamba is not known"):
        state_bytes(mamba, CONTEXT)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert main(["suggest", str(tmp_path), "--context", "64"]) == 0
    assert "skipped  suggest: cannot read" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["suggest", str(tmp_path / "empty")]) == 1
    assert "must hold models, got none" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_weights_count_once(tmp_path, corpus_dir, family):
    save_teacher(tmp_path / "tied", corpus_dir)
    teacher = make_teacher(family, vocab_size=300, tie_word_embeddings=True)
    teacher.save_pretrained(tmp_path / "tied")
    whole = distill.compress(teacher, layers="every-2").student.num_parameters()
    pairs = suggest([tmp_path / "tied"], context=CONTEXT)
    found = {pair.student.name: pair.student.parameters for pair in pairs}
    assert found["tied: every second layer"] == whole


def test_code_beside_a_model_is_not_asked_about(tmp_path, corpus_dir, monkeypatch):
    save_teacher(tmp_path, corpus_dir)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", None)
    for read in (load_model, lambda folder: suggest([folder])):
        with pytest.raises(DistillError, match=r"cannot load|must be a causal"):
            read(tmp_path)
