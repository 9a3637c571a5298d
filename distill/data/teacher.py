"""A teacher's next words on disk, so that no teacher is needed while a student learns.

A folder of shards and `cache.json`, which lists them. Every file is replaced in one move, a shard
listed after it is whole: what a killed run leaves is a shorter cache, which the next run of the
same settings continues. Which words, and in how many bits: `distill.data.words`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from distill.data.words import KINDS, Kind, Likeliest, Slice, Words, each, join, settings
from distill.errors import DistillError
from distill.files import file_digest, write_atomically

INDEX = "cache.json"
SHARD_ROWS = 1 << 16


class Shard(NamedTuple):
    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """`fingerprint`: what decides the teacher's words, by name; another one is another cache."""

    fingerprint: dict[str, str]
    kind: Kind
    vocabulary: int
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def settings(self) -> dict[str, str]:
        """All that decides what is in it."""
        return self.fingerprint | settings(self.kind) | {"vocabulary": str(self.vocabulary)}

    @classmethod
    def read(cls, folder: Path) -> Index:
        path = folder / INDEX
        try:
            found = json.loads(path.read_text())
            kind = KINDS.get(found.pop("format"))
            if kind is None:
                known = " or ".join(map(repr, KINDS))
                raise DistillError(f"teacher cache: {path} must have format {known}")
            of = kind(**{field.name: found.pop(field.name) for field in fields(kind)})
            shards = [Shard(*shard) for shard in found.pop("shards")]
            return cls(kind=of, shards=shards, **found)
        except OSError as error:
            raise DistillError(f"teacher cache: cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DistillError(f"teacher cache: {path} is damaged ({error}); delete it") from error

    def write(self, folder: Path) -> None:
        found = {"format": self.kind.format, "fingerprint": self.fingerprint, **asdict(self.kind)}
        found |= {"vocabulary": self.vocabulary, "shards": self.shards}
        write_atomically(folder / INDEX, json.dumps(found, indent=1))


def require_same(folder: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises DistillError, naming what differs, unless the cache in `folder` is what is wanted."""
    changed = [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if changed:
        raise DistillError(f"teacher cache: {folder} is another one: {'; '.join(changed[:3])}")


class TeacherCache:
    """What `CacheWriter` wrote, mapped into memory. A shard is checked when rows of it are first
    asked for.

    Args:
        folder: of the cache.
        fingerprint: what it has to be of; None takes any.

    Raises:
        DistillError: there is no cache, it is of another fingerprint, or a file of it is damaged.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str] | None = None):
        self.folder = Path(folder)
        self.index = Index.read(self.folder)
        if fingerprint is not None:
            require_same(self.folder, self.index.fingerprint, fingerprint)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.index.rows

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / shard.name).stat().st_size for shard in self.index.shards)

    @property
    def kind(self) -> Kind:
        return self.index.kind

    def rows(self, begin: int, end: int) -> Words:
        """Those of tokens [begin, end), in the order they were appended in."""
        if not 0 <= begin <= end <= len(self):
            raise DistillError(
                f"teacher cache: rows must lie within 0 and {len(self)}, got {begin} to {end}"
            )
        parts, first, vocabulary = [], 0, self.index.vocabulary
        for at, shard in enumerate(self.index.shards):
            inside = slice(max(begin - first, 0), max(min(end - first, shard.rows), 0))
            if inside.start < inside.stop:
                parts.append(self.kind.unpack(self._part(at), inside, vocabulary))
            first += shard.rows
        return join(parts or [self.kind.words(torch.empty(0, vocabulary), torch.empty(0))])

    def _part(self, at: int) -> Slice:
        shard = self._shard(at)
        return lambda name, rows: shard.get_slice(name)[rows]

    def verify(self) -> None:
        """Reads and checks every shard."""
        for at in range(len(self.index.shards)):
            self._shard(at)

    def _shard(self, at: int) -> Any:
        if at in self._open:
            return self._open[at]
        shard = self.index.shards[at]
        path = self.folder / shard.name
        try:
            if file_digest(path) != shard.sha256:
                raise DistillError(f"teacher cache: {path} is damaged (wrong checksum)")
            self._open[at] = safe_open(path, framework="np")
        except OSError as error:
            raise DistillError(f"teacher cache: cannot read {path}: {error.strerror}") from error
        except SafetensorError as error:
            raise DistillError(f"teacher cache: {path} is damaged ({error})") from error
        return self._open[at]


class CacheWriter:
    """Appends to a cache of `fingerprint`, `kind` and `vocabulary`, from where it ends.

    Use as a context manager: what is appended is on disk at the end, or after `shard_rows` tokens.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, str],
        kind: Kind,
        vocabulary: int,
        shard_rows: int = SHARD_ROWS,
    ):
        if isinstance(kind, Likeliest) and not 1 <= kind.k <= vocabulary:
            raise DistillError(f"teacher cache: k must be from 1 to {vocabulary}, got {kind.k}")
        self.folder, self.shard_rows = Path(folder), shard_rows
        self.index = Index(dict(fingerprint), kind, vocabulary)
        if (self.folder / INDEX).exists():
            there = Index.read(self.folder)
            require_same(self.folder, there.settings, self.index.settings)
            self.index = there
        self._waiting: list[Words] = []

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()

    def __len__(self) -> int:
        """Rows appended so far, in this run and before."""
        return self.index.rows + self._rows_waiting

    @property
    def _rows_waiting(self) -> int:
        return sum(len(part.ids) for part in self._waiting)

    def append(self, words: Words) -> None:
        """Rows of the next tokens; float32 log-probabilities on any device."""
        shape = (len(words.ids), self.index.kind.width)
        if words.logprobs.shape != shape or words.ids.shape != shape:
            raise DistillError(
                f"teacher cache: logprobs and ids must be (N, {shape[1]}), got"
                f" {tuple(words.logprobs.shape)} and {tuple(words.ids.shape)}"
            )
        none = (words.ids < 0) & (words.logprobs == float("-inf"))
        if not (words.logprobs.isfinite() | none).all():
            raise DistillError("teacher cache: logprobs must be finite, got inf or nan")
        self._waiting.append(each(words, Tensor.cpu))
        if self._rows_waiting >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """What was appended becomes a shard, and is listed."""
        if not self._rows_waiting:
            return
        words = join(self._waiting)
        data = save(self.index.kind.pack(words, self.index.vocabulary))
        name = f"shard-{len(self.index.shards):05}.safetensors"
        write_atomically(self.folder / name, data)
        shard = Shard(name, len(words.ids), hashlib.sha256(data).hexdigest())
        self.index.shards.append(shard)
        self.index.write(self.folder)
        self._waiting.clear()


def model_digest(model: nn.Module, stride: int = 1) -> str:
    """Changes with any bit of any weight; with a stride, of one byte in so many."""
    weights = sorted(model.state_dict().items())
    return digest(((name, x.detach().cpu()) for name, x in weights), stride)


def digest(parts: Iterable[Any], stride: int = 1) -> str:
    sha = hashlib.sha256()
    for name, tensor in parts:
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(np.ascontiguousarray(raw[::stride]).data)
    return sha.hexdigest()[:16]
