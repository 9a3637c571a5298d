"""Files in, tokens and batches out: nothing lost, nothing seen twice, nothing left to chance."""

import random
import re

import pytest
import torch

from distill.corpus import (
    Batches,
    Document,
    encode,
    end_of_text,
    load_corpus,
    read_documents,
    split_by_file,
    standard_library,
    token_sizes,
    tokenize,
    train_tokenizer,
)
from distill.errors import DistillError


def test_split_depends_on_paths_alone(corpus_dir):
    documents = read_documents(corpus_dir)
    shuffled = random.Random(1).sample(documents, len(documents))
    train, heldout = split_by_file(documents, 0.25, 1 << 20)
    assert (train, heldout) == split_by_file(shuffled, 0.25, 1 << 20)
    assert len(heldout) == 3
    assert {d.path for d in train} | {d.path for d in heldout} == {d.path for d in documents}
    assert not {d.path for d in train} & {d.path for d in heldout}


def test_heldout_files_beyond_the_byte_limit_are_not_trained_on(corpus_dir):
    documents = read_documents(corpus_dir)
    train, heldout = split_by_file(documents, 0.5, 1)
    assert (len(train), len(heldout)) == (6, 1)


def test_digest_changes_with_a_byte(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    before = load_corpus(tmp_path).digest
    assert before == load_corpus(tmp_path).digest
    (tmp_path / "a.py").write_text("x = 2\n")
    assert before != load_corpus(tmp_path).digest


def test_tests_and_installed_packages_are_skipped(tmp_path):
    for name in ("a.py", "b.py", "test/c.py", "site-packages/d.py", "pkg/tests/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "empty.py").touch()
    assert [d.path for d in read_documents(tmp_path)] == ["a.py", "b.py"]


def test_a_corpus_may_itself_lie_below_a_skipped_name(tmp_path):
    root = tmp_path / "test"
    root.mkdir()
    for name in ("a.py", "b.py"):
        (root / name).write_text("pass\n")
    assert len(read_documents(root)) == 2


@pytest.mark.slow
def test_standard_library_is_readable():
    documents = read_documents(standard_library())
    assert sum(len(d.text) for d in documents) > 5_000_000


def test_tokens_are_lossless_and_their_sizes_add_up(corpus_dir):
    documents = read_documents(corpus_dir)
    documents.append(Document("odd.py", "tab\t<|endoftext|> \x00 é 漢字 🙂  \r\n\n".encode()))
    tokenizer = train_tokenizer(documents[:6], 320)
    stream, sizes_V = encode(tokenizer, documents), token_sizes(tokenizer)
    assert stream.tokens_N[0] == stream.tokens_N[-1] == end_of_text(tokenizer)
    for s, document in enumerate(documents):
        tokens = stream.tokens_N[stream.starts[s] : stream.starts[s + 1]]
        assert tokens[-1] == end_of_text(tokenizer)
        assert tokenizer.decode(tokens[:-1].tolist()).encode() == document.text
        assert int(sizes_V[tokens].sum()) == len(document.text) == stream.n_bytes[s]


def test_tokenizer_is_the_same_each_time(corpus_dir):
    corpus = load_corpus(corpus_dir)
    assert tokenize(corpus, 320).tokenizer.to_str() == tokenize(corpus, 320).tokenizer.to_str()


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    tokens_N = torch.arange(8 * 4 * 5 + 1)
    batches = Batches(tokens_N, rows=4, length=5, seed=3)
    epochs = []
    for epoch in range(2):
        firsts = []
        for step in range(8):
            inputs_BT, labels_BT = batches.batch(epoch * 8 + step)
            assert torch.equal(inputs_BT + 1, labels_BT)
            firsts += inputs_BT[:, 0].tolist()
        assert sorted(firsts) == list(range(0, 160, 5))
        epochs.append(firsts)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone():
    tokens_N = torch.arange(1000)
    batches = Batches(tokens_N, 4, 5, seed=3)
    late = batches.batch(70)
    assert torch.equal(late[0], Batches(tokens_N, 4, 5, seed=3).batch(70)[0])
    assert not torch.equal(late[0], Batches(tokens_N, 4, 5, seed=4).batch(70)[0])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.touch(), "is not a directory"),
        (lambda root: root.mkdir(), "at least 2 non-empty files that match '*.py'"),
        (lambda root: _write(root / "a.py", b"\xff\xfe"), "a.py is not UTF-8 text"),
    ],
    ids=["missing", "a-file", "empty", "binary"],
)
def test_unusable_corpora_are_named(tmp_path, prepare, message):
    root = tmp_path / "corpus"
    prepare(root)
    with pytest.raises(DistillError) as error:
        load_corpus(root)
    assert message in str(error.value)
    assert str(root) in str(error.value)


@pytest.mark.parametrize("pattern", ["/*.py", "**.py***", ""])
def test_a_pattern_that_cannot_match_is_named(corpus_dir, pattern):
    with pytest.raises(DistillError, match=re.escape(repr(pattern))):
        read_documents(corpus_dir, pattern)


def test_unreadable_file_is_named(corpus_dir, monkeypatch):
    # As root every file is readable, so that permissions cannot show it.
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DistillError, match=r"cannot read .*\.py: Permission denied"):
        read_documents(corpus_dir)


def test_too_little_text_is_refused():
    with pytest.raises(DistillError, match="at least 21 tokens"):
        Batches(torch.arange(20), rows=4, length=5, seed=0)


def _write(path, data):
    path.parent.mkdir()
    path.write_bytes(data)
