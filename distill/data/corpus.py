"""Text from a directory, split by file, and the order in which it is read."""

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from distill.errors import DistillError

# Generated tables and manuals are not source; tests and installed packages are not the library.
SKIPPED_DIRS = frozenset(
    {"encodings", "pydoc_data", "site-packages", "dist-packages", "test", "tests", "idle_test"}
)


@dataclass(frozen=True)
class Document:
    """One file: its path relative to the corpus and its text, byte for byte."""

    path: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents split by file; `digest` changes with any byte of any of them."""

    root: Path
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    digest: str

    @property
    def train_bytes(self) -> int:
        return sum(len(document.text) for document in self.train)

    @property
    def heldout_bytes(self) -> int:
        return sum(len(document.text) for document in self.heldout)


def standard_library() -> Path:
    """The directory that holds the source of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(root: Path, pattern: str = "*.py") -> list[Document]:
    """Every non-empty file below `root` whose name matches, in the order of its path."""
    if not root.exists():
        raise DistillError(f"corpus: {root} does not exist")
    if not root.is_dir():
        raise DistillError(f"corpus: {root} is not a directory")
    try:
        paths = sorted(root.rglob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise DistillError(f"corpus: cannot match the pattern {pattern!r}: {error}") from error
    documents = []
    for path in paths:
        relative = path.relative_to(root)
        if SKIPPED_DIRS.intersection(relative.parts[:-1]) or not path.is_file():
            continue
        try:
            text = path.read_bytes()
            text.decode("utf-8")
        except OSError as error:
            raise DistillError(f"corpus: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DistillError(f"corpus: {path} is not UTF-8 text: {error.reason}") from error
        if text:
            documents.append(Document(relative.as_posix(), text))
    if len(documents) < 2:
        raise DistillError(
            f"corpus: {root} needs at least 2 non-empty files that match {pattern!r} "
            f"(one to train on, one to hold out), found {len(documents)}"
        )
    return documents


def split_by_file(
    documents: list[Document], heldout_fraction: float, heldout_bytes: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Train and held-out documents; the hash of a file's path decides, so order does not matter.

    At least one file is held out. Of the held-out files, only the first ones in hash order up to
    `heldout_bytes` are returned: scoring them all would take longer than training.
    """
    ranked = sorted(documents, key=lambda document: _digest(document.path.encode()))
    count = max(1, math.ceil(heldout_fraction * len(ranked)))
    train = sorted(ranked[count:], key=lambda document: document.path)
    heldout: list[Document] = []
    total = 0
    for document in ranked[:count]:
        if heldout and total + len(document.text) > heldout_bytes:
            continue
        heldout.append(document)
        total += len(document.text)
    return tuple(train), tuple(heldout)


def load_corpus(
    root: Path, pattern: str = "*.py", heldout_fraction: float = 0.05, heldout_bytes: int = 1 << 18
) -> Corpus:
    """Read `root` and split it; `heldout_bytes` bounds the text that scores are measured on."""
    documents = read_documents(root, pattern)
    train, heldout = split_by_file(documents, heldout_fraction, heldout_bytes)
    if not train:
        raise DistillError(
            f"corpus: heldout_fraction must leave one of {len(documents)} files to train on, got"
            f" {heldout_fraction}"
        )
    parts = [part for d in (*train, *heldout) for part in (d.path.encode(), d.text)]
    return Corpus(root, train, heldout, _digest(*parts))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, windows: int) -> torch.Tensor:
    """(windows,): the order in which an epoch visits them."""
    key = int(_digest(f"{seed}/{epoch}".encode())[:15], 16)
    return torch.randperm(windows, generator=torch.Generator().manual_seed(key))


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()
