"""Rows: what is in them, in which order, and which words of them count."""

import numpy as np
import pytest
import torch
from run_cases import byte_tokenizer, transformers

from distill.data.corpus import Document
from distill.data.rows import IGNORED, Rows
from distill.data.tokens import Tokens
from distill.errors import DistillError
from distill.evaluation.scores import encode

TEXTS = ["größe = 3\n", "x", "\tdef f():\n        return '🙂'\n", "0123456789" * 9]


@pytest.fixture(scope="module")
def tokens():
    documents = [Document(f"{at}.py", text.encode()) for at, text in enumerate(TEXTS)]
    return Tokens.of(documents, byte_tokenizer())


def test_bytes_are_ids_and_come_back(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)


def test_documents_are_closed_and_found(tokens):
    assert np.flatnonzero(tokens.ids_N == 256).tolist() == (tokens.starts_D1[1:] - 1).tolist()
    start = int(tokens.starts_D1[2])
    assert tokens.documents(start - 1, start + 1) == ["1.py", "2.py"]
    assert tokens.documents(start, start + 1) == ["2.py"]


def test_the_rows_of_a_step_do_not_depend_on_who_shares_them(tokens):
    rows = Rows(tokens, 4, 8, seed=3)
    for step in (0, 5, 17):
        whole = rows.batch(rows.windows_of(step)).input_ids
        shares = [rows.micro_batches(step, rank, 2, 1) for rank in range(2)]
        got = torch.cat([batch.input_ids for share in shares for batch in share])
        assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, whole.tolist()))


def test_an_epoch_reads_each_window_once(tokens):
    rows = Rows(tokens, 2, 8, seed=3)
    steps = rows.windows // 2
    epochs = [torch.cat([rows.windows_of(e * steps + s) for s in range(steps)]) for e in (0, 1)]
    for seen in epochs:
        assert len(set(seen.tolist())) == 2 * steps
    assert not torch.equal(*epochs)


def test_boundaries(tokens):
    """Documents and rows begin where `cu_seqlens` says, and their first words do not count."""
    rows = Rows(tokens, 4, 8, seed=3, boundaries=True)
    batch = rows.batch(torch.tensor([1, 0, 3]))
    ids, labels = batch.input_ids[0], batch.labels[0]
    starts = batch.cu_seqlens.tolist()
    assert starts[0] == 0 and starts[-1] == 24 and {8, 16} < set(starts)
    after_end = (torch.nonzero(ids == 256).flatten() + 1).tolist()
    assert set(starts) == {0, 8, 16, 24, *after_end}
    assert torch.nonzero(labels == IGNORED).flatten().tolist() == starts[:-1]
    counted = labels != IGNORED
    assert torch.equal(labels[counted], ids[counted])


def test_a_stage_reads_on_where_the_last_one_stopped(tokens):
    """What is read before does not come again until all windows have come."""
    rows = Rows(tokens, 2, 8, seed=3)
    first, then = rows.of_stage(0, False), rows.of_stage(3, False)
    steps = rows.windows // 2
    seen = [first.windows_of(step) for step in range(3)]
    seen += [then.windows_of(step) for step in range(steps - 3)]
    assert len(set(torch.cat(seen).tolist())) == 2 * steps
    assert torch.equal(then.windows_of(1), rows.windows_of(4))
    assert then.describe(1) == rows.describe(4) and then.sizes(1) == rows.sizes(4)


@pytest.mark.parametrize("boundaries", [False, True])
def test_sizes_of_a_step_are_those_of_its_batches(tokens, boundaries):
    rows = Rows(tokens, 4, 8, seed=3, boundaries=boundaries)
    for step in range(5):
        batches = rows.micro_batches(step, 0, 1, 3)
        for name, size in rows.sizes(step).items():
            assert size == sum(batch.sizes[name] for batch in batches)


def test_too_little_text(tokens):
    with pytest.raises(DistillError, match="needs 400 tokens, the training files have"):
        Rows(tokens, 50, 8, seed=3)


def test_a_document_begins_in_training_as_in_evaluation():
    tokenizer, document = byte_tokenizer(), Document("a", b"hi")
    for bos, begin in ((None, []), (tokenizer.eos_token, []), ("<s>", [257])):
        tokenizer.add_special_tokens({"bos_token": bos} if bos else {})
        ids = Tokens.of([document], tokenizer).ids_N.tolist()
        assert ids == [*begin, 104, 105, 256]
    assert encode(tokenizer, document)[0] == ids[:-1]
