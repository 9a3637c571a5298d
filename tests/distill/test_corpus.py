"""Files in, and their order: nothing lost, nothing seen twice, nothing left to chance."""

import random
import re

import numpy as np
import pytest
import torch

from distill.data.corpus import (
    epoch_order,
    load_corpus,
    read_documents,
    split,
    standard_library,
)
from distill.errors import DistillError


def test_a_split_has_every_document_in_one_part(corpus_dir):
    documents, corpus = read_documents(corpus_dir), load_corpus(corpus_dir, heldout_fraction=0.25)
    train, heldout = list(corpus.train), corpus.heldout
    assert [d for d in documents if d in train] == train
    assert len(heldout) == 3 == 12 - len(corpus.train)
    assert {*train, *heldout} == {*documents}
    assert corpus.train.size_bytes == sum(len(d.text) for d in train)
    # As recorded: a corpus that was split once is not to be trained on otherwise.
    assert [d.path for d in heldout] == ["pkg/module_10.py", "module_0.py", "pkg/module_4.py"]


def test_heldout_files_beyond_the_byte_limit_are_not_trained_on(corpus_dir):
    corpus = load_corpus(corpus_dir, heldout_fraction=0.5, heldout_bytes=1)
    assert (len(corpus.train), len(corpus.heldout)) == (6, 1)


def test_text_that_changes_meanwhile_is_refused(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text("x = 1\n")
    for change in ("", "one more\n"):
        corpus = load_corpus(tmp_path)
        (tmp_path / "c.py").write_text(change)
        with pytest.raises(DistillError, match="has changed while it was read"):
            list(corpus.train)


def test_the_order_of_documents_does_not_change_the_split():
    ranks, sizes = torch.randperm(40).numpy(), torch.randint(1, 9, (40,)).numpy()
    order = np.array(random.Random(1).sample(range(40), 40))
    train_D, chosen = split(ranks, sizes, 0.25, 20)
    again_D, others = split(ranks[order], sizes[order], 0.25, 20)
    assert np.array_equal(train_D[order], again_D) and (~train_D).sum() == 10
    assert list(chosen) == order[list(others)].tolist()


def test_what_chooses_does_not_report(corpus_dir):
    corpus = load_corpus(corpus_dir, heldout_fraction=0.5)
    validation, test = corpus.halves
    assert {*validation, *test} == {*corpus.heldout} and not {*validation} & {*test}
    sizes = [sum(len(d.text) for d in part) for part in corpus.halves]
    assert abs(sizes[0] - sizes[1]) <= max(len(d.text) for d in corpus.heldout)
    assert corpus.halves.require_validation("tune") == validation
    kb = [f"{size / 1e3:.1f} kB" for size in sizes]
    assert corpus.halves.describe() == f"held out 3 for validation, {kb[0]}; 3 for test, {kb[1]}"
    one = load_corpus(corpus_dir)
    assert one.halves == ((), one.heldout)
    with pytest.raises(DistillError, match=r"^tune: at least 2 documents must be held out.*got 1;"):
        one.halves.require_validation("tune")


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


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    epochs = [epoch_order(3, epoch, 40) for epoch in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(40)) for epoch in epochs)
    assert not torch.equal(*epochs)
    epoch_order.cache_clear()
    assert torch.equal(epochs[0], epoch_order(3, 0, 40))
    assert not torch.equal(epochs[0], epoch_order(4, 0, 40))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.touch(), "at least 2 documents that are not empty"),
        (lambda root: root.mkdir(), "in files that match '*.py'"),
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


def _write(path, data):
    path.parent.mkdir()
    path.write_bytes(data)
