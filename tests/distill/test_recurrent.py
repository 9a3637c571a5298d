"""The sLSTM language model: decoding, packing, files, as student and teacher; mLSTM models too."""

import doctest

import pytest
import torch
from hybrid_cases import VOCAB, make_teacher, tokens, transformers

import distill
import xlstm_kernels as xk
from distill.data.corpus import Document
from distill.errors import DistillError
from distill.models import recurrent
from distill.models.recurrent import SLSTMConfig, SLSTMForCausalLM
from xlstm_kernels.testing import relative_error


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "bos_token_id": 1}
    model = SLSTMForCausalLM(SLSTMConfig(**sizes | {"num_hidden_layers": 3} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def test_decode_equals_prefill():
    model, ids = make_model().double(), tokens(20)
    want = model(ids, use_cache=False).logits
    cache, got = None, []
    for piece in ids.split([1, 7, 1, 11], dim=1):
        output = model(piece, past_key_values=cache)
        cache = output.past_key_values
        got.append(output.logits)
    assert relative_error(torch.cat(got, dim=1), want) <= 1e-6  # the state is float32
    assert cache.get_seq_length() == 20
    assert relative_error(model(ids, logits_to_keep=2).logits, want[:, -2:]) <= 1e-6


def test_generate():
    model = make_model()
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 8, "do_sample": False}
        got = model.generate(tokens(9), attention_mask=torch.ones(2, 9), **options)
        assert got.shape == (2, 17)
        assert torch.equal(got, model.generate(tokens(9), use_cache=False, **options))


@torch.no_grad()
def test_packed_documents_do_not_see_one_another():
    model, ids = make_model(), tokens(20, B=1)
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    got = model(ids, cu_seq_lens_q=cu_seqlens, position_ids=None).logits
    want = [model(part, use_cache=False).logits for part in ids.split([7, 13], dim=1)]
    assert relative_error(got, torch.cat(want, dim=1)) <= 1e-6
    with pytest.raises(DistillError, match="use_cache must be False"):
        model(ids, cu_seq_lens_q=cu_seqlens, use_cache=True)
    with pytest.raises(DistillError, match=r"attention_mask must be .* got zeros"):
        model(ids, attention_mask=torch.zeros(1, 20))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_save_and_load(tied, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for loaded in (
        distill.load_student(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(loaded.eval()(tokens(9)).logits, model(tokens(9)).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with pytest.raises(DistillError, match="window must be None for a model of type slstm, got 4"):
        distill.load_student(tmp_path, window=4)


def test_recomputed_activations():
    model, grads = make_model().train(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens(20), labels=tokens(20)).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(*grads, strict=True))


def test_as_student_and_as_teacher():
    specs = [distill.LossSpec("kl"), distill.LossSpec("ce"), distill.LossSpec("hidden_mse")]
    pairs = [(make_model(), make_teacher()), (make_model(num_hidden_layers=2), make_model())]
    for student, teacher in pairs:
        module = distill.DistillModule(student.train(), teacher, specs)
        found = module(tokens(12), tokens(12))
        sum(value / count for value, count in found.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@torch.no_grad()
def test_fewer_blocks():
    teacher = make_model()
    student, layer_map, _ = distill.compress(teacher, layers=2, layer_map="last")
    assert layer_map == [1, 2]
    by_influence = distill.compress(teacher, layers=2, layer_map="influence", inputs=tokens(9))
    assert len(by_influence.layer_map) == 2
    del teacher.model.layers[0]
    teacher.config.num_hidden_layers = 2
    assert torch.equal(student(tokens(9)).logits, teacher(tokens(9)).logits)


def test_an_mlstm_model_scores_the_same_on_our_kernels():
    torch.manual_seed(0)
    config = transformers.xLSTMConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=256, chunk_size=16
    )
    model = transformers.xLSTMForCausalLM(config)
    documents = [Document("a.txt", bytes(range(97, 97 + 48))), Document("b.txt", b"abc" * 16)]
    before = distill.evaluate(model, None, documents, length=16)
    xk.replace_layers(model)
    after = distill.evaluate(model, None, documents, length=16)
    assert after.bits_per_byte == pytest.approx(before.bits_per_byte, rel=1e-5)


def test_the_docstrings_example():
    result = doctest.testmod(recurrent)
    assert result.attempted and not result.failed


def test_models_that_mix_documents_are_refused():
    student = transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(vocab_size=VOCAB, hidden_size=32, num_heads=4, num_blocks=1)
    )
    module = distill.DistillModule(student, None, [distill.LossSpec("ce")])
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32)
    with pytest.raises(DistillError, match="of type xlstm does not keep packed ones apart"):
        module(tokens(20, B=1), tokens(20, B=1), cu_seqlens=cu_seqlens)
