"""The teacher cache: what is read is what was written, and nothing else is ever taken for it."""

import json

import pytest
import torch

import xlstm_kernels as xk
from distill.data.teacher import INDEX, CacheWriter, TeacherCache, model_digest
from distill.data.words import Likeliest, TopK, pack_ids, unpack_ids
from distill.errors import DistillError

OF = {"model": "abc", "data": "def"}
V, K = 1000, 16
KIND = Likeliest(K)


def make_words(N: int, seed: int = 0) -> TopK:
    logits = 4 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))
    return KIND.words(logits)


def write(folder, words: TopK, shard_rows: int = 40, step: int = 25) -> None:
    with CacheWriter(folder, OF, KIND, V, shard_rows) as writer:
        for begin in range(len(writer), len(words.ids), step):
            writer.append(TopK(*(part[begin : begin + step] for part in words)))


def assert_same(got: TopK, want: TopK) -> None:
    assert torch.equal(got.ids, want.ids)
    assert ((got.logprobs - want.logprobs).abs() <= 0.5 / 2048).all()
    assert torch.equal(got.tail_logmass, want.tail_logmass)


def test_rows_come_back_across_shards(tmp_path):
    words = make_words(110)
    write(tmp_path, words)
    cache = TeacherCache(tmp_path, OF)
    assert len(cache) == 110 and len(cache.index.shards) == 3
    for begin, end in ((0, 110), (49, 51), (50, 50), (3, 4), (109, 110)):
        assert_same(cache.rows(begin, end), TopK(*(part[begin:end] for part in words)))
    cache.verify()
    # 16 ids of 10 bits, as many log-probabilities of 16 bits, the tail; and what names the shards.
    assert 110 * (20 + 32 + 4) < cache.size_bytes < 110 * 56 + 3 * 300


def test_a_student_learns_the_same_from_it(tmp_path):
    """The loss and its gradient, of words as cached and as the teacher has them."""
    words, student = make_words(30), torch.randn(30, V, requires_grad=True)
    write(tmp_path, words)

    def loss_and_grad(given: TopK):
        loss = xk.topk_kl_div(
            student, given.logprobs, given.ids, tail_logmass=given.tail_logmass, support="tail"
        )
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    for got, want in zip(
        loss_and_grad(TeacherCache(tmp_path).rows(0, 30)), loss_and_grad(words), strict=True
    ):
        assert (got - want).norm() <= 1e-3 * want.norm()


def test_what_a_kill_leaves_is_continued(tmp_path):
    words = make_words(110)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, words)
    with pytest.raises(KeyboardInterrupt), CacheWriter(killed, OF, KIND, V, 40) as writer:
        writer.append(TopK(*(part[:50] for part in words)))
        writer.append(TopK(*(part[50:60] for part in words)))  # not on disk yet
        raise KeyboardInterrupt
    assert len(TeacherCache(killed)) == 50
    (killed / "shard-00001.safetensors").write_bytes(b"half of a shard that is not listed")
    write(killed, words)
    assert_same(TeacherCache(killed, OF).rows(0, 110), words)
    assert (killed / INDEX).read_text() == (whole / INDEX).read_text()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index", "format", "no index"])
def test_damage_is_refused(tmp_path, damage):
    write(tmp_path, make_words(110))
    shard, index = tmp_path / "shard-00001.safetensors", tmp_path / INDEX
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if damage == "flip":
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-9])
    elif damage == "gone":
        shard.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-5])
    elif damage == "format":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format": "other"}))
    else:
        index.unlink()
    with pytest.raises(DistillError, match=r"teacher cache: .*(damaged|cannot read|format)"):
        TeacherCache(tmp_path).rows(45, 80)


def test_another_teacher_is_refused(tmp_path):
    write(tmp_path, make_words(30))
    message = "is another one: model is abc there and xyz here"
    with pytest.raises(DistillError, match=message):
        TeacherCache(tmp_path, OF | {"model": "xyz"})
    with pytest.raises(DistillError, match=message):
        CacheWriter(tmp_path, OF | {"model": "xyz"}, KIND, V)
    with pytest.raises(DistillError, match="k is 16 there and 8 here"):
        CacheWriter(tmp_path, OF, Likeliest(8), V)
    with pytest.raises(DistillError, match="length is None there and 512 here"):
        TeacherCache(tmp_path, OF | {"length": "512"})


def test_bad_rows_are_refused(tmp_path):
    words = make_words(5)
    with pytest.raises(DistillError, match="k must be from 1 to 1000, got 0"):
        CacheWriter(tmp_path, OF, Likeliest(0), V)
    writer = CacheWriter(tmp_path, OF, KIND, V)
    with pytest.raises(DistillError, match=r"must be \(N, 16\), got \(5, 15\) and \(5, 16\)"):
        writer.append(words._replace(logprobs=words.logprobs[:, 1:]))
    with pytest.raises(DistillError, match="must be finite"):
        writer.append(words._replace(logprobs=words.logprobs.log()))
    writer.append(words._replace(ids=words.ids + 1024))
    with pytest.raises(DistillError, match="ids must be below 1024"):
        writer.flush()
    write(tmp_path / "other", words)
    with pytest.raises(DistillError, match="rows must lie within 0 and 5, got 3 to 6"):
        TeacherCache(tmp_path / "other").rows(3, 6)


@pytest.mark.parametrize("bits", [1, 7, 8, 17])
def test_ids_take_as_many_bits_as_they_need(bits):
    ids = torch.randint(0, 1 << bits, (9, 13)).numpy()
    packed = pack_ids(ids, bits)
    assert packed.shape == (9, -(-13 * bits // 8))
    assert (unpack_ids(packed, 13, bits) == ids).all()


def test_the_tail_of_a_sure_teacher_has_its_digits():
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, :K] = 40
    want = torch.log(torch.tensor(V - K)) - torch.logsumexp(logits, -1)
    assert (KIND.words(logits.float()).tail_logmass - want).abs() < 1e-4
    assert KIND.words(logits[:, :K]).tail_logmass == float("-inf")


def test_the_digest_of_a_model_changes_with_its_weights():
    model = torch.nn.Linear(3, 2).bfloat16()
    before = model_digest(model)
    with torch.no_grad():
        model.bias[1] += 1
    assert model_digest(model) != before
