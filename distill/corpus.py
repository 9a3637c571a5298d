"""Text from a directory, split by file, as tokens of a byte-level BPE and as training batches."""

import hashlib
import math
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    parts = [part for d in (*train, *heldout) for part in (d.path.encode(), d.text)]
    return Corpus(root, train, heldout, _digest(*parts))


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """A lossless byte-level BPE with at most `vocab_size` entries and no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((document.text.decode() for document in documents), trainer)
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that separates files: one past the tokenizer's own, so that no text produces it."""
    return tokenizer.get_vocab_size()


def token_sizes(tokenizer: Tokenizer) -> torch.Tensor:
    """Bytes of text that each id stands for, (V,) int64; the end-of-text id stands for none."""
    # A byte-level token is spelled with one character for each of its bytes.
    vocab = tokenizer.get_vocab()
    sizes = [len(token) for token in sorted(vocab, key=vocab.__getitem__)]
    return torch.tensor([*sizes, 0])


@dataclass(frozen=True)
class TokenStream:
    """Files one after another: end-of-text, file, end-of-text, file, ..., end-of-text.

    tokens_N int64; file s fills positions starts[s] to starts[s + 1], its closing end-of-text
    included, so that every token but the first belongs to one file.  n_bytes[s] is its text's size.
    """

    tokens_N: torch.Tensor
    starts: tuple[int, ...]
    n_bytes: tuple[int, ...]


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> TokenStream:
    """Encode documents into one stream of tokens."""
    documents = list(documents)
    separator = end_of_text(tokenizer)
    ids, starts = [separator], [1]
    for encoding in tokenizer.encode_batch_fast([d.text.decode() for d in documents]):
        ids += encoding.ids
        ids.append(separator)
        starts.append(len(ids))
    sizes = tuple(len(document.text) for document in documents)
    return TokenStream(torch.tensor(ids, dtype=torch.int64), tuple(starts), sizes)


@dataclass(frozen=True)
class Text:
    """A corpus as a model sees it; `vocab` counts the end-of-text id too."""

    tokenizer: Tokenizer
    vocab: int
    train_N: torch.Tensor
    heldout: TokenStream
    sizes_V: torch.Tensor

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, up to the end of a file."""
        end = self.vocab - 1
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


def tokenize(corpus: Corpus, vocab_size: int) -> Text:
    """Train a tokenizer on the training files and encode both parts with it."""
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    return Text(
        tokenizer,
        end_of_text(tokenizer) + 1,
        encode(tokenizer, corpus.train).tokens_N,
        encode(tokenizer, corpus.heldout),
        token_sizes(tokenizer),
    )


class Batches:
    """Training batches as a pure function of the step, so that a resumed run needs no history.

    The stream is cut into windows of `length` tokens; each epoch visits them in a new order drawn
    from (seed, epoch).
    """

    def __init__(self, tokens_N: torch.Tensor, rows: int, length: int, seed: int):
        self.tokens_N, self.rows, self.length, self.seed = tokens_N, rows, length, seed
        self.windows = (len(tokens_N) - 1) // length
        if self.windows < rows:
            raise DistillError(
                f"corpus: training needs at least {rows * length + 1} tokens for one batch of "
                f"{rows} x {length}, got {len(tokens_N)}"
            )

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of one step, each (rows, length) int64; labels are inputs shifted."""
        epoch, index = divmod(step, self.windows // self.rows)
        order_W = epoch_order(self.seed, epoch, self.windows)
        start_B1 = order_W[index * self.rows : (index + 1) * self.rows, None] * self.length
        position_BT = start_B1 + torch.arange(self.length + 1)
        window_BT = self.tokens_N[position_BT]
        return window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()


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
