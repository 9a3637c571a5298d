"""Tiny teachers of every family that `hybridize` takes."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from distill.data.corpus import load_corpus  # noqa: E402
from distill.hybrid import convert as hybrid  # noqa: E402 - they import it
from distill.hybrid import stages  # noqa: E402

__all__ = [
    "TEACHERS",
    "families",
    "hybrid",
    "make_teacher",
    "save_teacher",
    "stages",
    "stir",
    "tokens",
]

VOCAB = 60
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that generation does not end
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
TEACHERS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", SIZES | {"scale_attn_by_inverse_layer_idx": True}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED | {"head_dim": 12}),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", GROUPED | {"head_dim": 12}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": 64}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", GROUPED | {"clip_qkv": 1.5}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "olmo3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        GROUPED | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED | {"partial_rotary_factor": 0.5}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GROUPED | {"no_rope_layers": [1, 0, 1]}),
}


families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "llama" else pytest.mark.slow) for f in TEACHERS]
)


def make_teacher(family="llama", **changes):
    """Weights large enough that attention is not uniform and layers differ; dropout is off."""
    config, model, sizes = TEACHERS[family]
    torch.manual_seed(0)
    teacher = getattr(transformers, model)(getattr(transformers, config)(**sizes | changes))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher.eval()


def stir(student):
    """Gates and feature maps that depend on what they get, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hybrid.new_parameters(student).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return student


def tokens(T, B=2, seed=0):
    return torch.randint(2, VOCAB, (B, T), generator=torch.Generator().manual_seed(100 * T + seed))


def save_teacher(folder, corpus_dir):
    """A small Llama and a tokenizer of the corpus, as `save_pretrained` writes them."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(load_corpus(corpus_dir).train, 300), eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_tokenizer(documents, vocab_size):
    """A lossless byte-level BPE with at most `vocab_size` entries and no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((document.text.decode() for document in documents), trainer)
    return tokenizer
