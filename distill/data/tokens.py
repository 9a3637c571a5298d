"""Documents as tokens: in memory, or in files mapped into it, for text of any size."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from distill.data.corpus import Corpus, Source, load_corpus
from distill.data.formats import Document
from distill.data.teacher import digest
from distill.errors import DistillError, Interrupt
from distill.files import file_digest, replace_folder, write_atomically
from distill.progress import Reporter

FORMAT = "xlstm_kernels.tokens/1"
TOKENS = "tokens"  # the folder, within another
INDEX, HELDOUT = "tokens.json", "heldout.jsonl"
# Files of a folder, and what they are arrays of: `Tokens`, then `Names`.
ARRAYS = {"ids": "<i4", "starts": "<i8", "names": "u1", "name_ends": "<i8"}
TOGETHER_BYTES = 1 << 20  # of text that a tokenizer gets at once, on several threads


@dataclass(frozen=True)
class Tokens:
    """Documents one after another, each closed by the tokenizer's end of text, and begun by its
    begin of text if that is another word, as `evaluate` and `generate` begin.

    ids_N int32; document d fills starts_D1[d] to starts_D1[d + 1].
    """

    ids_N: np.ndarray
    starts_D1: np.ndarray
    names: Sequence[str] | Names

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: Any) -> Tokens:
        parts, starts, names = [], [0], []
        for name, ids in encoded(documents, tokenizer):
            parts.append(ids)
            starts.append(starts[-1] + len(ids))
            names.append(name)
        return cls(np.concatenate(parts), np.array(starts, dtype=np.int64), tuple(names))

    @classmethod
    def of_bytes(cls, documents: Iterable[Document], end: int) -> Tokens:
        """What `of` makes with `byte_tokenizer`, at once."""
        parts, names = [], []
        for document in documents:
            text = np.frombuffer(document.text, dtype=np.uint8)
            parts.append(np.append(text.astype(np.int32), np.int32(end)))
            names.append(document.path)
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return cls(np.concatenate(parts), starts, tuple(names))

    def digest(self) -> str:
        """Changes with any token and any boundary."""
        return self._digest

    @cached_property
    def _digest(self) -> str:  # of a large corpus it takes a second a gigabyte
        arrays = {"ids": self.ids_N, "starts": self.starts_D1}
        return digest((name, torch.from_numpy(array)) for name, array in arrays.items())

    def cut(self, most: int | None) -> Tokens:
        """The first of them."""
        return Tokens(self.ids_N[:most], self.starts_D1, self.names)

    def fingerprint(self, length: int, boundaries: bool) -> dict[str, str]:
        """Of a teacher cache over them, as windows of `length`."""
        whole = len(self.ids_N) // length * length
        starts_D = self.starts_D1[self.starts_D1 < whole]
        parts = {"tokens": self.ids_N[:whole]} | ({"starts": starts_D} if boundaries else {})
        data = digest((name, torch.from_numpy(array)) for name, array in parts.items())
        return {"data": data, "length": str(length), "boundaries": str(boundaries).lower()}

    def documents(self, begin: int, end: int) -> list[str]:
        """Names of those that tokens [begin, end) are from."""
        first = int(np.searchsorted(self.starts_D1, begin, side="right")) - 1
        last = int(np.searchsorted(self.starts_D1, end, side="left"))
        return [self.names[at] for at in range(first, min(last, len(self.names)))]


def encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and ids (int32) of documents, one after another."""
    if tokenizer.eos_token_id is None:
        raise DistillError(
            "tokenizer: it must have an eos_token, to put between documents, got None"
        )
    end = tokenizer.eos_token_id
    begin = [x for x in (tokenizer.bos_token_id,) if x not in (None, end)]
    for batch in _batches(documents):
        texts = [document.text.decode() for document in batch]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for document, ids in zip(batch, found, strict=True):
            yield document.path, np.array([*begin, *ids, end], dtype=np.int32)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Text(NamedTuple):
    """What is trained on, and the documents that scores are measured on."""

    tokens: Tokens
    heldout: tuple[Document, ...]


@dataclass(frozen=True)
class Plan:
    """All that decides a `Text` beside the files and the tokenizer."""

    source: Source
    heldout_fraction: float = 0.05
    heldout_bytes: int = 1 << 18

    def corpus(self) -> Corpus:
        source = self.source
        given = source.root, source.pattern, self.heldout_fraction, self.heldout_bytes
        return load_corpus(*given, source.text_key)

    def key(self, tokenizer: Any) -> str:
        """Changes with any file's size and time, and with the tokenizer. Reading all of a large
        corpus would take longer than the time is worth."""
        source = self.source
        files = []
        for path in source.files:
            try:
                found = source.place(path).stat()
            except OSError as error:
                raise DistillError(f"corpus: cannot read {path}: {error.strerror}") from error
            files.append((path, found.st_size, found.st_mtime_ns))
        inner = getattr(tokenizer, "backend_tokenizer", None)
        words = sorted(tokenizer.get_vocab().items()) if inner is None else inner.to_str()
        ends = tokenizer.bos_token_id, tokenizer.eos_token_id
        how = str(source.root.resolve()), source.text_key, self.heldout_fraction, self.heldout_bytes
        parts = FORMAT, how, files, type(tokenizer).__name__, words, ends
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def stored_text(
    plan: Plan, tokenizer: Any, folder: Path, reporter: Reporter, interrupt: Interrupt
) -> Text:
    """The text as it lies in a folder of `folder`, where it is written first if it is not there.

    Files are mapped into memory. Other files, or another tokenizer, have a folder of their own.

    Raises:
        DistillError: the text cannot be read, or a file of the folder is damaged.
        Interrupted: a signal came; nothing is left.
    """
    place = folder / plan.key(tokenizer)
    if place.exists():
        return _read(place)
    corpus = plan.corpus()
    total, megabytes = len(corpus.train), corpus.train.size_bytes / 1e6
    reporter.say(f"text     {total} documents, {megabytes:.1f} MB, as tokens to {place}")
    with _locked(folder), reporter.meter("tokens", total) as meter:

        def after(done: int, tokens: int) -> None:
            meter.update(done, tokens=tokens)
            if corpus.train.size_bytes > TOGETHER_BYTES:  # less is done at once
                interrupt.check()

        if not place.exists():  # another process may have written it by now
            replace_folder(place, lambda to: _write(to, corpus, tokenizer, after))
    return _read(place)


def _write(to: Path, corpus: Corpus, tokenizer: Any, after: Callable[[int, int], None]) -> None:
    to.mkdir()
    at = named = 0
    files: dict[str, BinaryIO] = {}
    try:
        for name in ARRAYS:
            files[name] = (to / _file(name)).open("wb")
        files["starts"].write(np.array(0, ARRAYS["starts"]).tobytes())
        for done, (path, ids) in enumerate(encoded(corpus.train, tokenizer), start=1):
            at, named = at + len(ids), named + len(path.encode())
            files["ids"].write(ids.astype(ARRAYS["ids"]).tobytes())
            files["starts"].write(np.array(at, ARRAYS["starts"]).tobytes())
            files["names"].write(path.encode())
            files["name_ends"].write(np.array(named, ARRAYS["name_ends"]).tobytes())
            after(done, len(ids))
    finally:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    lines = [json.dumps({"path": x.path, "text": x.text.decode()}) for x in corpus.heldout]
    write_atomically(to / HELDOUT, "".join(f"{line}\n" for line in lines))
    index = {"format": FORMAT} | _checksums(to, _mapped(to))
    write_atomically(to / INDEX, json.dumps(index, indent=1))


def _read(place: Path) -> Text:
    try:
        index = json.loads((place / INDEX).read_text())
        if index["format"] != FORMAT:
            raise DistillError(f"tokens: {place} must have format {FORMAT!r}; delete it")
        tokens = _mapped(place)
        if index != {"format": FORMAT} | _checksums(place, tokens):
            raise DistillError(f"tokens: {place} is damaged (wrong checksum); delete it")
        rows = [json.loads(line) for line in (place / HELDOUT).open()]
        return Text(tokens, tuple(Document(row["path"], row["text"].encode()) for row in rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillError(f"tokens: {place} is damaged ({error}); delete it") from error


def _checksums(place: Path, tokens: Tokens) -> dict[str, str]:
    others = (HELDOUT, *(_file(name) for name in list(ARRAYS)[2:]))
    return {"tokens": tokens.digest()} | {name: file_digest(place / name) for name in others}


def _mapped(place: Path) -> Tokens:
    # Copied where written to, which nobody does: torch warns of arrays that cannot be.
    ids, starts, names, name_ends = (
        np.memmap(place / _file(name), dtype, mode="c") for name, dtype in ARRAYS.items()
    )
    return Tokens(ids, starts, Names(names, name_ends))


def _file(name: str) -> str:
    return f"{name}.bin"


class Names:
    """Many strings in two arrays."""

    def __init__(self, text: np.ndarray, ends_D: np.ndarray):
        self.text, self.ends_D = text, ends_D

    def __len__(self) -> int:
        return len(self.ends_D)

    def __getitem__(self, at: int) -> str:
        begin = self.ends_D[at - 1] if at else 0
        return bytes(self.text[begin : self.ends_D[at]]).decode()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DistillError(f"cannot write {folder}: {error.strerror}") from error
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
