"""Tokens on disk: the same as in memory, whole or not at all, and no others."""

import io
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from rich.console import Console
from run_cases import byte_tokenizer

from distill.data.corpus import Source, load_corpus
from distill.data.rows import Rows
from distill.data.tokens import Plan, Tokens, stored_text
from distill.errors import DistillError, Interrupt, Interrupted
from distill.progress import Reporter


def stored(corpus_dir, folder, tokenizer=None, interrupt=None, **changes):
    """The text, and whether it has just been written."""
    output = io.StringIO()
    plan = Plan(Source(corpus_dir), **changes)
    reporter = Reporter(Console(file=output))
    tokenizer = tokenizer or byte_tokenizer()
    text = stored_text(plan, tokenizer, folder, reporter, interrupt or Interrupt())
    return text, "as tokens to" in output.getvalue()


def test_batches_are_those_of_text_in_memory(corpus_dir, tmp_path):
    corpus = load_corpus(corpus_dir, heldout_fraction=0.25)
    want = Tokens.of(corpus.train, byte_tokenizer())
    for written in (True, False):
        text, was_written = stored(corpus_dir, tmp_path, heldout_fraction=0.25)
        assert was_written == written
        got = text.tokens
        assert isinstance(got.ids_N, np.memmap) and got.ids_N.dtype == want.ids_N.dtype
        assert got.digest() == want.digest() == "a74d7066f678ab17"  # as ever
        assert got.fingerprint(24, True) == want.fingerprint(24, True)
        assert got.documents(0, 10**6) == list(want.names)
        assert text.heldout == corpus.heldout
        for boundaries in (False, True):
            rows = [Rows(tokens, 4, 24, 1, boundaries) for tokens in (got, want)]
            for step in (0, 7):
                a, b = (x.batch(x.windows_of(step)) for x in rows)
                assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert rows[0].describe(3) == rows[1].describe(3)


def test_other_text_has_another_folder(corpus_dir, tmp_path):
    root, folder = tmp_path / "corpus", tmp_path / "tokens"
    root.mkdir()
    for name in ("a.py", "b.py", "c.py"):
        (root / name).write_text(f"{name} = 1\n")
    first, _ = stored(root, folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert stored(root, folder, tokenizer)[1]
    assert stored(root, folder, heldout_fraction=0.5)[1]
    (root / "c.py").write_text("other\n")
    changed, was_written = stored(root, folder)
    assert was_written and changed.tokens.digest() != first.tokens.digest()
    os.utime(root / "c.py", (1, 1))  # the time alone: read again, to the same tokens
    again, was_written = stored(root, folder)
    assert was_written and again.tokens.digest() == changed.tokens.digest()
    assert not stored(root, folder)[1]
    assert not stored(root / ".." / root.name, folder)[1]


@pytest.mark.parametrize(
    "name", ["ids.bin", "starts.bin", "names.bin", "heldout.jsonl", "tokens.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_refused(corpus_dir, tmp_path, name, damage):
    stored(corpus_dir, tmp_path)
    (path,) = tmp_path.glob(f"*/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-9])
    if damage == "gone":
        path.unlink()
    with pytest.raises(DistillError, match=r"tokens: .* is damaged .*; delete it"):
        stored(corpus_dir, tmp_path)


def test_a_format_of_another_version_is_refused(corpus_dir, tmp_path):
    stored(corpus_dir, tmp_path)
    (path,) = tmp_path.glob("*/tokens.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "other"}))
    with pytest.raises(DistillError, match="must have format"):
        stored(corpus_dir, tmp_path)


def test_a_stop_leaves_nothing(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.data.tokens.TOGETHER_BYTES", 1000)
    interrupt = Interrupt()
    interrupt.requested = signal.SIGTERM
    with pytest.raises(Interrupted):
        stored(corpus_dir, tmp_path, interrupt=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert stored(corpus_dir, tmp_path)[1]


@pytest.mark.slow
def test_two_processes_write_it_once(corpus_dir, tmp_path):
    """A second one waits, and reads what the first has written."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_digest, [(corpus_dir, tmp_path)] * 4)
    assert len(set(found)) == 1
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def _digest(corpus_dir, folder):
    return stored(corpus_dir, folder)[0].tokens.digest()
