"""Hugging Face transformers' xLSTM replaced: the same outputs, gradients and tokens."""

import copy

import pytest
import torch

import xlstm_kernels as xk
from xlstm_kernels.testing import check_results, relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")


def make_config(chunk_size=16):
    return transformers.xLSTMConfig(
        vocab_size=60,
        **dict.fromkeys(("hidden_size", "embedding_dim"), 128),
        **dict.fromkeys(("num_hidden_layers", "num_blocks"), 2),
        num_heads=2,
        chunk_size=chunk_size,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = transformers.xLSTMForCausalLM(make_config())
    with torch.no_grad():
        for parameter in model.parameters():  # its own gates would all be alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def replaced(model):
    model = copy.deepcopy(model)
    report = xk.replace_layers(model)
    kinds = [row.layer for row in report.replaced]
    assert kinds == ["xLSTMModel"] + 2 * [
        (modeling.external_xlstm and "mLSTMBackend") or "xLSTMBackend"
    ]
    return model


def tokens(T, B=2):
    return torch.randint(0, 60, (B, T), generator=torch.Generator().manual_seed(T))


def logits_and_gradients(model, ids):
    model.train()
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": output.logits.detach()} | grads


def test_outputs_and_gradients(model):
    ids = tokens(48)
    exact = logits_and_gradients(copy.deepcopy(model).double(), ids)
    got = logits_and_gradients(replaced(model), ids)

    def plains():
        for chunk_size in (16, 8, 12, 24, 48):  # the same sums in other orders
            other = transformers.xLSTMForCausalLM(make_config(chunk_size))
            other.load_state_dict(model.state_dict())
            yield logits_and_gradients(other, ids)

    check_results(got, exact, plains())


@pytest.mark.parametrize("T", [1, 5, 37])
@torch.no_grad()
def test_prefill_of_any_length(model, T):
    ids = tokens(T)
    assert relative_error(replaced(model)(ids).logits, model(ids).logits) <= 1e-5


def test_training_at_any_length(model):
    ours = replaced(model)
    got = logits_and_gradients(ours, tokens(37))
    exact = logits_and_gradients(ours.double(), tokens(37))
    assert all(relative_error(got[name], exact[name]) <= 1e-3 for name in exact)
    ours.float().gradient_checkpointing_enable()
    again = logits_and_gradients(ours, tokens(37))
    assert all(relative_error(again[name], got[name]) <= 1e-5 for name in got)


def test_generation_token_for_token(model):
    want = model.generate(tokens(5), max_new_tokens=20, do_sample=False)
    assert torch.equal(
        replaced(model).generate(tokens(5), max_new_tokens=20, do_sample=False), want
    )


@torch.no_grad()
def test_the_cache_keeps_float32(model):
    half = replaced(model.bfloat16())
    cache = None
    for token in tokens(20).split(1, 1):
        cache = half(token, cache_params=cache, use_cache=True).cache_params
    assert cache.seqlen_offset == 20
    for c, n, m in cache.rnn_state.values():
        assert c.dtype == n.dtype == m.dtype == torch.float32
        assert not torch.equal(c, c.bfloat16().float())


@torch.no_grad()
def test_prefill_in_pieces(model):
    """A long prompt without a cache: transformers then keeps bfloat16 states between pieces."""
    ours = replaced(model)
    want = ours(tokens(37), use_cache=False).logits
    ours.config.max_inference_chunksize = 16
    assert relative_error(ours(tokens(37), use_cache=False).logits, want) <= 1e-5


def test_save_and_load_in_the_unswapped_model(model, tmp_path):
    ours = replaced(model)
    ours.save_pretrained(tmp_path / "whole")
    ours.backbone.save_pretrained(tmp_path / "backbone")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "backbone").architectures == [
        "xLSTMModel"
    ]
    loaded = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        want = model(tokens(9)).logits
        assert torch.equal(loaded(tokens(9)).logits, want)
        xk.restore_layers(ours)
        assert torch.equal(ours(tokens(9)).logits, want)
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True])
def test_compiled(model, use_cache):
    """One graph, where the model's own code is one."""
    ours = replaced(model)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    if use_cache:
        with torch.no_grad():
            want = ours(tokens(37)).logits
            assert relative_error(compiled(tokens(37)).logits, want) <= 1e-6
        return
    want = logits_and_gradients(ours, tokens(37))
    got = logits_and_gradients(compiled, tokens(37))
    for name, gradient in want.items():
        got_name = name if name == "logits" else f"_orig_mod.{name}"
        assert relative_error(got[got_name], gradient) <= 1e-4


@torch.no_grad()
def test_autocast(model):
    exact = model(tokens(9)).logits
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = (m(tokens(9)).logits for m in (model, replaced(model)))
    assert got.dtype == plain.dtype
    assert relative_error(got, exact) <= 2 * relative_error(plain, exact)


class DecodeStep(torch.nn.Module):
    """A token from states given as tensors, as an exported program takes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, states):
        cache = modeling.xLSTMCache(self.model.config, len(ids), dtype=torch.float32)
        cache.rnn_state.update(states)
        cache.seqlen_offset = 1  # not the first
        output = self.model(ids, cache_params=cache, use_cache=True)
        return output.logits, {layer: tuple(state) for layer, state in cache.rnn_state.items()}


@torch.no_grad()
def test_export_of_the_decode_step(model):
    ours = replaced(model)
    cache = ours(tokens(5), use_cache=True).cache_params
    states = {layer: tuple(state) for layer, state in cache.rnn_state.items()}
    given = tokens(1), copy.deepcopy(states)
    exported = torch.export.export(DecodeStep(ours), given)
    assert any("mlstm_step" in str(node.target) for node in exported.graph.nodes)
    want, want_after = DecodeStep(ours)(tokens(1), copy.deepcopy(states))
    got, after = exported.module()(tokens(1), copy.deepcopy(states))
    assert torch.equal(got, want)
    for layer, state in want_after.items():
        assert all(torch.equal(a, b) for a, b in zip(after[layer], state, strict=True))


def test_training_takes_the_same_course(model):
    curves = []
    for trained in (replaced(model), model):
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        losses = []
        for step in range(20):
            ids = tokens(16 + 16 * (step % 2))
            loss = trained(ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-2:].mean() < curves[0][:2].mean()
    assert relative_error(*curves) <= 1e-4
