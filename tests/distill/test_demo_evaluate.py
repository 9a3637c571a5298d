"""Bits per byte are a code length: every token once, whatever the layout."""

import math

import pytest
import torch

from distill.corpus import Document, encode, train_tokenizer
from distill.demo.evaluate import agreement, bits_per_byte, bits_per_byte_by_file, score
from distill.demo.model import ModelConfig, generate, seeded_model

SIZES = ModelConfig(vocab=40, width=16, layers=2, heads=2, ffn=16)


class Uniform(torch.nn.Module):
    """Every token equally likely, in a vocabulary of 2**6."""

    def forward(self, tokens_BT, state=None):
        return torch.zeros(*tokens_BT.shape, 64), None


@pytest.mark.parametrize("n_tokens", [2, 3, 17, 64, 101])
@pytest.mark.parametrize("rows", [1, 4])
def test_uniform_model_needs_six_bits_a_token(n_tokens, rows):
    scores = score(Uniform(), torch.arange(n_tokens) % 64, rows=rows, length=7)
    assert scores.nats_N.shape == scores.top_N.shape == (n_tokens - 1,)
    n_bytes = 3 * n_tokens
    bits = bits_per_byte(float(scores.nats_N.sum()), n_bytes)
    assert bits == pytest.approx(6 * (n_tokens - 1) / n_bytes, rel=1e-6)


def test_carried_state_equals_one_pass():
    model, tokens_N = seeded_model(SIZES, 0).eval(), torch.randint(40, (58,))
    logits_BTV, _ = model(tokens_N[None, :-1])
    want_N = -logits_BTV[0].log_softmax(-1).gather(1, tokens_N[1:, None])[:, 0]
    scores = score(model, tokens_N, rows=1, length=10)
    torch.testing.assert_close(scores.nats_N, want_N.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.top_N, logits_BTV[0].argmax(-1))


def test_files_add_up_to_the_whole():
    documents = [Document(f"{n}.py", (f"x = {n}\n" * (n + 1)).encode()) for n in range(5)]
    stream = encode(train_tokenizer(documents, 260), documents)
    nats_N = torch.rand(len(stream.tokens_N) - 1, dtype=torch.float64)
    by_file = bits_per_byte_by_file(nats_N, stream)
    bits = sum(b * n for b, n in zip(by_file, stream.n_bytes, strict=True))
    assert bits == pytest.approx(float(nats_N.sum()) / math.log(2))


def test_agreement_is_the_share_of_equal_choices():
    assert agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75


def test_generation_depends_on_the_seed_alone():
    model = seeded_model(SIZES, 0).eval()
    torch.manual_seed(1)
    first = generate(model, [1, 2], 8, temperature=1.0, seed=3)
    assert first == generate(model, [1, 2], 8, temperature=1.0, seed=3)
    assert first != generate(model, [1, 2], 8, temperature=1.0, seed=4)
    assert len(first) == 8
