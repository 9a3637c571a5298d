"""Text below a folder, document by document, and which of it is held out."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distill.data.formats import Document, documents_of
from distill.errors import DistillError

# Generated tables and manuals are not source; tests and installed packages are not the library.
SKIPPED_DIRS = frozenset(
    {"encodings", "pydoc_data", "site-packages", "dist-packages", "test", "tests", "idle_test"}
)


@dataclass(frozen=True)
class Source:
    """The documents of files below a folder whose names match, or of one file."""

    root: Path
    pattern: str = "*.py"
    text_key: str = "text"

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Their paths below the folder, in order."""
        root, pattern = self.root, self.pattern
        if not root.exists():
            raise DistillError(f"corpus: {root} does not exist")
        if root.is_file():
            return (root.name,)
        try:
            paths = [path.relative_to(root) for path in root.rglob(pattern)]
        except (ValueError, NotImplementedError) as error:
            raise DistillError(f"corpus: cannot match the pattern {pattern!r}: {error}") from error
        kept = (
            path.as_posix()
            for path in paths
            if not SKIPPED_DIRS.intersection(path.parts[:-1]) and (root / path).is_file()
        )
        return tuple(sorted(kept))

    def place(self, path: str) -> Path:
        return self.root if self.root.is_file() else self.root / path

    def __iter__(self) -> Iterator[Document]:
        """One at a time, so that they need not fit into memory together."""
        for path in self.files:
            yield from documents_of(self.place(path), path, self.text_key)


@dataclass(frozen=True)
class Part:
    """Some of the documents of a source, which are read anew each time."""

    source: Source
    inside_D: np.ndarray  # whether a document is one of them
    size_bytes: int

    def __len__(self) -> int:
        return int(self.inside_D.sum())

    def __iter__(self) -> Iterator[Document]:
        count = 0
        for count, document in enumerate(self.source, start=1):
            if count > len(self.inside_D):
                break
            if self.inside_D[count - 1]:
                yield document
        if count != len(self.inside_D):
            raise DistillError(f"corpus: {self.source.root} has changed while it was read")


class Halves(NamedTuple):
    """Documents that are held out: those to choose by, and those to report on, which have chosen
    nothing. One alone is to report on."""

    validation: tuple[Document, ...]
    test: tuple[Document, ...]

    def require_validation(self, operation: str) -> tuple[Document, ...]:
        """`validation`; raises DistillError where there is none."""
        if not self.validation:
            raise DistillError(
                f"{operation}: at least 2 documents must be held out, one to choose by and one to"
                f" report on, got {len(self.test)}; hold out more (heldout_fraction)"
            )
        return self.validation

    def describe(self) -> str:
        sizes = (
            f"{len(part)} for {name}, {sum(len(document.text) for document in part) / 1e3:.1f} kB"
            for name, part in self._asdict().items()
        )
        return f"held out {'; '.join(sizes)}"


def halves_of(heldout: Sequence[Document]) -> Halves:
    """One after the other goes where there are fewer bytes, the first to the test."""
    validation: list[Document] = []
    test: list[Document] = []
    balance = 0
    for document in heldout:
        to_test = balance <= 0
        (test if to_test else validation).append(document)
        balance += len(document.text) if to_test else -len(document.text)
    return Halves(tuple(validation), tuple(test))


@dataclass(frozen=True)
class Corpus:
    """Documents in two parts; `digest` changes with any byte of any of them.

    chosen: numbers of the held-out documents that scores are measured on.
    """

    source: Source
    train: Part
    chosen: tuple[int, ...]
    digest: str

    @property
    def root(self) -> Path:
        return self.source.root

    @cached_property
    def heldout(self) -> tuple[Document, ...]:
        """In the order of the hashes of their paths."""
        inside_D = np.zeros(len(self.train.inside_D), dtype=bool)
        inside_D[list(self.chosen)] = True
        found = dict(zip(sorted(self.chosen), Part(self.source, inside_D, 0), strict=True))
        return tuple(found[at] for at in self.chosen)

    @property
    def heldout_bytes(self) -> int:
        return sum(len(document.text) for document in self.heldout)

    @property
    def halves(self) -> Halves:
        return halves_of(self.heldout)


def standard_library() -> Path:
    """The directory that holds the source of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(root: Path, pattern: str = "*.py", text_key: str = "text") -> list[Document]:
    """Every document that is not empty, in the order of files, and of lines and rows in them."""
    documents = list(Source(root, pattern, text_key))
    _require_two(root, pattern, len(documents))
    return documents


def load_corpus(
    root: Path,
    pattern: str = "*.py",
    heldout_fraction: float = 0.05,
    heldout_bytes: int = 1 << 18,
    text_key: str = "text",
) -> Corpus:
    """Read through `root` and split it; `heldout_bytes` bounds the text that is scored."""
    source = Source(root, pattern, text_key)
    sha, ranks, sizes = hashlib.sha256(), array("Q"), array("q")
    for document in source:
        path = _framed(document.path.encode())
        ranks.append(int.from_bytes(hashlib.sha256(path).digest()[:8], "big"))
        sizes.append(len(document.text))
        sha.update(path + _framed(document.text))
    _require_two(root, pattern, len(sizes))
    sizes_D = np.array(sizes)
    train_D, chosen = split(np.array(ranks), sizes_D, heldout_fraction, heldout_bytes)
    if not train_D.any():
        raise DistillError(
            f"corpus: heldout_fraction must leave one of {len(sizes)} documents to train on, got"
            f" {heldout_fraction}"
        )
    part = Part(source, train_D, int(sizes_D[train_D].sum()))
    return Corpus(source, part, chosen, sha.hexdigest())


def split(
    ranks_D: np.ndarray, sizes_D: np.ndarray, heldout_fraction: float, heldout_bytes: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Which documents are trained on, and numbers of those that are scored.

    At least one is held out. `ranks` are hashes of their paths: their order does not matter. Of
    those held out, only the first ones in the order of ranks up to `heldout_bytes` are scored: all
    would take longer than training.
    """
    order = np.argsort(ranks_D, kind="stable").tolist()
    held = order[: max(1, math.ceil(heldout_fraction * len(order)))]
    chosen: list[int] = []
    total = 0
    for at in held:
        if chosen and total + sizes_D[at] > heldout_bytes:
            continue
        chosen.append(at)
        total += int(sizes_D[at])
    train_D = np.ones(len(order), dtype=bool)
    train_D[held] = False
    return train_D, tuple(chosen)


def _require_two(root: Path, pattern: str, found: int) -> None:
    if found < 2:
        raise DistillError(
            f"corpus: {root} needs at least 2 documents that are not empty, in files that match"
            f" {pattern!r} (one to train on, one to hold out), found {found}"
        )


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, windows: int) -> torch.Tensor:
    """(windows,): the order in which an epoch visits them."""
    key = int(hashlib.sha256(_framed(f"{seed}/{epoch}".encode())).hexdigest()[:15], 16)
    return torch.randperm(windows, generator=torch.Generator().manual_seed(key))


def _framed(part: bytes) -> bytes:
    """So that no two lists of parts are the same bytes one after another."""
    return len(part).to_bytes(8, "little") + part
