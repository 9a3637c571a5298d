"""Words that are drawn from a teacher: unbiased, the same each time, and small on disk."""

import pytest
import torch

import xlstm_kernels as xk
from distill.data.teacher import CacheWriter, TeacherCache
from distill.data.words import Drawn, Likeliest, TopK, join, stratified
from distill.errors import DistillError

V, N = 50, 4000
KIND = Drawn(6, seed=3)


def make_logits(rows, width=V, scale=1.5, seed=0):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def gradient(student_V, words, support, **more):
    """(N, V): of one student's logits, for each row of words."""
    student_NV = student_V.double().expand(len(words.ids), -1).clone().requires_grad_()
    logprobs = words.logprobs.double()
    loss = xk.topk_kl_div(student_NV, logprobs, words.ids, support=support, reduction="sum", **more)
    return torch.autograd.grad(loss, student_NV)[0]


def test_the_mean_gradient_is_that_of_the_whole_distribution():
    """Within what so many draws can tell; that of the likeliest words is further away by far."""
    teacher_V, student_V = make_logits(1), make_logits(1, seed=1)
    dense_V = (student_V.double().softmax(-1) - teacher_V.double().softmax(-1))[0]
    words = KIND.words(teacher_V.expand(N, -1), torch.arange(N) * 7 + 10**12)
    drawn_NV = gradient(student_V, words, "sampled")
    error_V = drawn_NV.std(0) / N**0.5
    assert ((drawn_NV.mean(0) - dense_V).abs() <= 5 * error_V + 1e-12).all()
    (biased_V,) = gradient(student_V, Likeliest(6).words(teacher_V), "renormalized")
    assert (biased_V - dense_V).norm() > 20 * error_V.norm()
    p_V = teacher_V.double().softmax(-1)[0]
    independent = (p_V * (1 - p_V)).sum() / KIND.samples
    assert drawn_NV.var(0).sum() < 0.7 * independent


def test_draws_are_functions_of_seed_and_position():
    positions = torch.tensor([0, 1, 5, 10**13, -(2**62)])
    at = stratified(1, positions, 8)
    assert (at * 8).long().tolist() == [list(range(8))] * 5
    assert torch.equal(stratified(1, positions[3:], 8), at[3:])
    others = [stratified(2, positions, 8), stratified(1, positions + 1, 8)]
    assert all(((at - other).abs() > 1e-9).all() for other in others)
    many = stratified(0, torch.arange(5000), 2) * 2 % 1
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(many.T)[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([many[1:, 0], many[:-1, 0]]))[0, 1]) < 0.05


def test_words_are_counted():
    logits = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]]).log()
    words = Drawn(10).words(logits, torch.arange(2))
    assert words.ids[0, :3].tolist() in ([0, 2, -1], [0, -1, -1])
    assert words.ids.shape == (2, 10) and words.ids[1, :4].tolist() == [0, 1, 2, 3]
    for row in words.logprobs.exp():
        assert row.sum() == pytest.approx(1)
    assert words.logprobs[words.ids < 0].exp().sum() == 0
    logits[1, 2] = float("nan")
    spoilt = Drawn(10).words(logits, torch.arange(2)).logprobs.isnan()
    assert spoilt.any(-1).tolist() == [False, True]


def write(folder, words, kind=KIND, killed_at=None):
    with CacheWriter(folder, {"model": "abc"}, kind, 1000, shard_rows=40) as writer:
        for begin in range(len(writer), len(words.ids), 25):
            if begin == killed_at:
                raise KeyboardInterrupt
            writer.append(words._make(part[begin : begin + 25] for part in words))


def test_draws_come_back_from_disk(tmp_path):
    kind, rows = Drawn(50, seed=1), 210
    words = kind.words(make_logits(rows, 1000, scale=4), torch.arange(rows))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", words, kind, killed_at=75)
    (tmp_path / "cut" / "shard-00001.safetensors").write_bytes(b"not listed")
    write(tmp_path / "cut", words, kind)
    write(tmp_path / "whole", words, kind)
    names = [sorted(x.name for x in (tmp_path / folder).iterdir()) for folder in ("cut", "whole")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    cache = TeacherCache(tmp_path / "cut", {"model": "abc"})
    for begin, end in ((0, rows), (49, 51), (50, 50), (3, 4), (rows - 1, rows)):
        got = cache.rows(begin, end)
        assert torch.equal(got.ids, words.ids[begin:end])
        assert torch.equal(got.logprobs, words.logprobs[begin:end])
    each = (words.ids >= 0).sum().item() / rows
    shards = len(cache.index.shards)
    assert cache.size_bytes <= rows * (2 + each * 16 / 8) + shards * (400 + 64 * 2)


def test_other_draws_are_refused(tmp_path):
    words = KIND.words(make_logits(30, 1000), torch.arange(30))
    write(tmp_path, words)
    for kind, why in (
        (Drawn(6, seed=4), "seed is 3 there and 4 here"),
        (Drawn(7, seed=3), "samples is 6 there and 7 here"),
        (Likeliest(6), "words is drawn there and likeliest here"),
    ):
        with pytest.raises(DistillError, match=why):
            CacheWriter(tmp_path, {"model": "abc"}, kind, 1000)
    with pytest.raises(DistillError, match="samples must be from 1 to 65535, got 0"):
        Drawn(0)
    with pytest.raises(DistillError, match="positions must be given"):
        KIND.words(make_logits(2))
    with pytest.raises(DistillError, match="must be finite"):
        write(tmp_path / "nan", KIND.words(make_logits(2) * float("nan"), torch.arange(2)))


def test_parts_are_joined():
    words = Likeliest(3).words(make_logits(5))
    parts = [TopK(*(part[rows] for part in words)) for rows in (slice(2), slice(2, 5))]
    assert all(torch.equal(a, b) for a, b in zip(join(parts), words, strict=True))
