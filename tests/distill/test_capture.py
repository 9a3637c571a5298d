"""`distill cache` on a tiny model: what the teacher says, from the command line, after any stop."""

import shutil
import signal

import numpy as np
import pytest
import torch

from distill.__main__ import main, resume_command
from distill.data.capture import CaptureConfig, capture, first_tokens, load_teacher, save_model
from distill.data.corpus import load_corpus
from distill.data.teacher import TeacherCache
from distill.data.tokens import Tokens
from distill.data.words import Drawn, Likeliest
from distill.errors import DistillError, Interrupt, Interrupted
from distill.hybrid.stages import sparse_loss, topk_targets
from distill.losses.module import DistillModule, LossSpec
from distill.losses.taps import Run
from distill.progress import Reporter

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from hybrid_cases import save_teacher  # noqa: E402 - it imports it

KIND = Likeliest(8)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory, corpus_dir):
    return save_teacher(tmp_path_factory.mktemp("teacher"), corpus_dir)


def arguments(teacher_dir, corpus_dir, out, *more):
    given = ["--teacher", teacher_dir, "--corpus", corpus_dir, "--out", out, "--pattern", "*.py"]
    sizes = ["-k", "8", "--length", "16", "--rows", "3", "--max-tokens", "200"]
    return [str(x) for x in ("cache", *given, *sizes, *more)]


def test_the_cache_is_what_the_teacher_says(teacher_dir, corpus_dir, tmp_path, capsys):
    assert main(arguments(teacher_dir, corpus_dir, tmp_path)) == 0
    assert "12 windows of 16" in capsys.readouterr().out
    cache = TeacherCache(tmp_path)
    assert len(cache) == 192 and cache.kind == KIND
    model, _ = load_teacher(teacher_dir)
    ids = torch.randint(0, model.config.vocab_size, (2, 16))
    capture_of(model, ids.flatten(), tmp_path / "two")
    words = TeacherCache(tmp_path / "two").rows(0, 32)
    online = topk_targets(model, ids, 8)
    assert torch.equal(words.ids.view(2, 16, 8), online.ids)
    assert (words.logprobs.view(2, 16, 8) - online.logprobs).abs().max() < 1e-3
    losses = [sparse_loss(model, ids, given)[0].detach() for given in (online, words)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_draws_of_a_cache_are_those_of_its_teacher(teacher_dir, tmp_path):
    """Also where the teacher reads other rows at once; and what a loss is told of them fits."""
    model, _ = load_teacher(teacher_dir)
    tokens_N, kind = torch.randint(0, model.config.vocab_size, (64,)), Drawn(12, seed=3)
    capture_of(model, tokens_N, tmp_path, kind=kind)
    got = TeacherCache(tmp_path).rows(16, 48)
    rows = tokens_N[16:48].view(2, 16)
    want = Run(model, rows, {}).words(kind, torch.arange(16, 48).view(2, 16))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    asks = {"samples": 12, "seed": 3}
    online = DistillModule(load_teacher(teacher_dir)[0], model, [LossSpec("topk_kl", args=asks)])
    offline = DistillModule(online.student, None, [LossSpec("topk_kl")])
    beside = online(rows, rows, positions=torch.arange(16, 48).view(2, 16))
    cached = offline(rows, rows, words=got)
    assert torch.equal(beside["topk_kl"][0], cached["topk_kl"][0])
    for args, words, why in (
        ({"support": "tail"}, got, r"support must be 'sampled' .* got 'tail'"),
        ({"temperature": 2.0}, got, r"temperature must be 1.0 .* got 2.0"),
        ({"divergence": "js"}, got, r"divergence must be 'forward' .* got 'js'"),
        ({"support": "sampled"}, Likeliest(8).words(torch.randn(32, 301)), "likeliest"),
    ):
        module = DistillModule(online.student, None, [LossSpec("topk_kl", args=args)])
        with pytest.raises(DistillError, match=why):
            module(rows, rows, words=words)
    with pytest.raises(DistillError, match="positions must be given"):
        online(rows, rows)


def capture_of(model, tokens_N, out, interrupt=None, length=16, kind=KIND):
    tokens = Tokens(tokens_N.int().numpy(), np.array([0, len(tokens_N)]), ("all",))
    from rich.console import Console

    config = CaptureConfig(kind, length=length, rows=1, max_tokens=None)
    reporter = Reporter(Console(quiet=True))
    capture(model, tokens, out, config, reporter, interrupt or Interrupt())


def test_a_stopped_run_goes_on(teacher_dir, tmp_path):
    model, _ = load_teacher(teacher_dir)
    tokens_N = torch.randint(0, model.config.vocab_size, (80,))
    interrupt = Interrupt()
    interrupt.requested = signal.SIGTERM
    for expected in (1, 2):
        with pytest.raises(Interrupted):
            capture_of(model, tokens_N, tmp_path / "stopped", interrupt)
        assert len(TeacherCache(tmp_path / "stopped")) == 16 * expected
    capture_of(model, tokens_N, tmp_path / "stopped")
    capture_of(model, tokens_N, tmp_path / "whole")
    got, want = (TeacherCache(tmp_path / name).rows(0, 80) for name in ("stopped", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert "--resume" not in resume_command(["cache", "--out", "x"])


def test_another_length_or_text_is_refused(teacher_dir, tmp_path):
    model, _ = load_teacher(teacher_dir)
    tokens_N = torch.arange(40)
    capture_of(model, tokens_N, tmp_path)
    with pytest.raises(DistillError, match="length is 16 there and 8 here"):
        capture_of(model, tokens_N, tmp_path, length=8)
    with pytest.raises(DistillError, match="is another one: data"):
        capture_of(model, tokens_N + 1, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(DistillError, match="is another one: model"):
        capture_of(model, tokens_N, tmp_path)


def test_dry_run_writes_nothing(teacher_dir, corpus_dir, tmp_path, capsys):
    assert main(arguments(teacher_dir, corpus_dir, tmp_path / "out", "--dry-run")) == 0
    assert "bytes a token" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "nan", "model.layers.1.self_attn.k_proj"),
        ("model.layers.0.mlp.down_proj.weight", "inf", "model.layers.0.mlp.down_proj"),
        ("model.norm.weight", "nan", "model.norm"),
        ("lm_head.weight", "-inf", "lm_head"),
        ("lm_head.weight", None, "lm_head"),  # finite itself, and too large
    ],
)
def test_a_teacher_that_is_not_finite_is_refused(
    teacher_dir, corpus_dir, tmp_path, capsys, name, value, why
):
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    model, tokenizer = load_teacher(teacher_dir)
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.view(-1)[3] = torch.finfo(weight.dtype).max if value is None else float(value)
        if value is None:
            weight.fill_(torch.finfo(weight.dtype).max)
    save_model(teacher, model, tokenizer)
    given = ["--teacher", teacher, "--corpus", corpus_dir, "--pattern", "*.py", "--out", out]
    for command in (
        ["hybridize", "--window", 4, "--length", 64],
        ["compress", "--layers", 1],
        ["cache", "--length", 64, "--tokens", tmp_path / "tokens"],
    ):
        assert main([str(x) for x in (*command, *given)]) == 1
        err = capsys.readouterr().err
        assert f"teacher: {why} must give finite numbers on the text" in err
        assert (f"since {name} is not finite" in err) == (value is not None)
        assert err.count("\n") == 1 and not out.exists()


WRONG = (
    "no teacher",
    "no weights",
    "cut weights",
    "lacking weights",
    "no eos",
    "short",
    "no corpus",
)


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_one_line(wrong, teacher_dir, corpus_dir, tmp_path, capsys):
    teacher, corpus, more = tmp_path / "teacher", corpus_dir, []
    shutil.copytree(teacher_dir, teacher)
    if wrong == "no teacher":
        teacher = tmp_path / "nowhere"
    elif wrong == "no weights":
        (teacher / "model.safetensors").unlink()
    elif wrong == "cut weights":
        (teacher / "model.safetensors").write_bytes(b"cut")
    elif wrong == "lacking weights":
        config = transformers.AutoConfig.from_pretrained(teacher)
        config.num_hidden_layers += 1
        config.save_pretrained(teacher)
    elif wrong == "no eos":
        tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
        tokenizer.eos_token = None
        tokenizer.save_pretrained(teacher)
    elif wrong == "short":
        more = ["--length", "500"]
    else:
        corpus = tmp_path / "nowhere"
    assert main(arguments(teacher, corpus, tmp_path / "out", *more)) == 1
    err = capsys.readouterr().err
    assert err.startswith("distill: ") and err.count("\n") == 1 and "Traceback" not in err


def test_statistics_are_of_training_files(corpus_dir, teacher_dir):
    _, tokenizer = load_teacher(teacher_dir)
    corpus = load_corpus(corpus_dir)
    want = Tokens.of(corpus.train, tokenizer).ids_N
    for most in (100, len(want), len(want) + 1):
        assert np.array_equal(first_tokens(corpus, tokenizer, most).numpy(), want[:most])


def test_more_tokens_than_positions_are_refused(tmp_path):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=8, n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    )
    with pytest.raises(DistillError, match="length must be at most 8, the positions of the model"):
        capture_of(model, torch.arange(40), tmp_path)
