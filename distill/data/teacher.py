"""A teacher's likeliest next words on disk, so that no teacher is needed while a student learns.

A folder of shards and `cache.json`, which lists them. Every file is replaced in one move, a shard
listed after it is whole: what a killed run leaves is a shorter cache, which the next run of the
same settings continues. Ids take as many bits as the vocabulary needs, log-probabilities 16 bits
each (steps of 2^-11 nats down to -32), what is left for all other words 32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from distill.errors import DistillError
from distill.files import file_digest, write_atomically

FORMAT = "xlstm_kernels.teacher/1"
INDEX = "cache.json"
SHARD_ROWS = 1 << 16
STEPS_PER_NAT = 2048
PARTS = ("ids", "steps", "tail_logmass")  # of a shard
LEAST = -32.0  # log-probabilities below count as this


class TopK(NamedTuple):
    """Of N tokens: the k likeliest next words, likeliest first, and all other words' share."""

    logprobs: Tensor  # (N, k) float32
    ids: Tensor  # (N, k) int64
    tail_logmass: Tensor  # (N,) float32, -inf where k is the whole vocabulary


class Shard(NamedTuple):
    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """`fingerprint`: what decides the teacher's words, by name; another one is another cache."""

    fingerprint: dict[str, str]
    k: int
    vocabulary: int
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @classmethod
    def read(cls, folder: Path) -> Index:
        path = folder / INDEX
        try:
            found = json.loads(path.read_text())
            if found.pop("format") != FORMAT:
                raise DistillError(f"teacher cache: {path} must have format {FORMAT!r}")
            return cls(**found | {"shards": [Shard(*shard) for shard in found["shards"]]})
        except OSError as error:
            raise DistillError(f"teacher cache: cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DistillError(f"teacher cache: {path} is damaged ({error}); delete it") from error

    def write(self, folder: Path) -> None:
        write_atomically(folder / INDEX, json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    def require(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        """Raises DistillError, naming what differs, unless the cache is of `fingerprint`."""
        names = dict.fromkeys([*self.fingerprint, *fingerprint])
        changed = [
            f"{name} is {self.fingerprint.get(name)} there and {fingerprint.get(name)} here"
            for name in names
            if self.fingerprint.get(name) != fingerprint.get(name)
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
            self.index.require(self.folder, fingerprint)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.index.rows

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / shard.name).stat().st_size for shard in self.index.shards)

    def rows(self, begin: int, end: int) -> TopK:
        """Those of tokens [begin, end), in the order they were appended in."""
        if not 0 <= begin <= end <= len(self):
            raise DistillError(
                f"teacher cache: rows must lie within 0 and {len(self)}, got {begin} to {end}"
            )
        parts, first = [], 0
        for at, shard in enumerate(self.index.shards):
            inside = slice(max(begin - first, 0), max(min(end - first, shard.rows), 0))
            if inside.start < inside.stop:
                found = self._shard(at)
                parts.append({name: found.get_slice(name)[inside] for name in PARTS})
            first += shard.rows
        return self._unpack(parts)

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

    def _unpack(self, parts: list[dict[str, np.ndarray]]) -> TopK:
        k, bits = self.index.k, id_bits(self.index.vocabulary)
        if not parts:
            return TopK(torch.empty(0, k), torch.empty(0, k, dtype=torch.int64), torch.empty(0))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return TopK(
            torch.from_numpy(joined["steps"].astype(np.float32) / -STEPS_PER_NAT),
            torch.from_numpy(unpack_ids(joined["ids"], k, bits)),
            torch.from_numpy(joined["tail_logmass"]),
        )


class CacheWriter:
    """Appends to a cache of `fingerprint`, `k` and `vocabulary`, from where it ends.

    Use as a context manager: what is appended is on disk at the end, or after `shard_rows` tokens.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, str],
        k: int,
        vocabulary: int,
        shard_rows: int = SHARD_ROWS,
    ):
        if not 1 <= k <= vocabulary:
            raise DistillError(f"teacher cache: k must be from 1 to {vocabulary}, got {k}")
        self.folder, self.shard_rows = Path(folder), shard_rows
        self.index = Index(dict(fingerprint), k, vocabulary)
        if (self.folder / INDEX).exists():
            sizes = {"k": str(k), "vocabulary": str(vocabulary)}
            self.index = Index.read(self.folder)
            there = {"k": str(self.index.k), "vocabulary": str(self.index.vocabulary)}
            Index(self.index.fingerprint | there, k, vocabulary).require(
                self.folder, {**fingerprint, **sizes}
            )
        self._waiting: list[TopK] = []

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

    def append(self, words: TopK) -> None:
        """Rows of the next tokens; float32 log-probabilities on any device."""
        shape = (len(words.ids), self.index.k)
        if words.logprobs.shape != shape or words.ids.shape != shape:
            raise DistillError(
                f"teacher cache: logprobs and ids must be (N, {self.index.k}), got"
                f" {tuple(words.logprobs.shape)} and {tuple(words.ids.shape)}"
            )
        if not torch.isfinite(words.logprobs).all():
            raise DistillError("teacher cache: logprobs must be finite, got inf or nan")
        self._waiting.append(TopK(*(part.cpu() for part in words)))
        if self._rows_waiting >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """What was appended becomes a shard, and is listed."""
        if not self._rows_waiting:
            return
        words = TopK(*(torch.cat(part) for part in zip(*self._waiting, strict=True)))
        steps = (words.logprobs.float().clamp(LEAST, 0) * -STEPS_PER_NAT).round()
        data = save(
            {
                "ids": pack_ids(words.ids.numpy(), id_bits(self.index.vocabulary)),
                "steps": steps.clamp_(max=2**16 - 1).numpy().astype(np.uint16),
                "tail_logmass": words.tail_logmass.float().numpy(),
            }
        )
        name = f"shard-{len(self.index.shards):05}.safetensors"
        write_atomically(self.folder / name, data)
        shard = Shard(name, len(words.ids), hashlib.sha256(data).hexdigest())
        self.index.shards.append(shard)
        self.index.write(self.folder)
        self._waiting.clear()


def topk_words(logits_NV: Tensor, k: int) -> TopK:
    """Of a teacher's logits, any float dtype."""
    log_p = logits_NV.float().log_softmax(dim=-1)
    logprobs, ids = log_p.topk(k, dim=-1)
    # Of the others themselves: 1 less the sum would have no digits where the teacher is sure.
    tail = log_p.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)
    return TopK(logprobs, ids, tail)


def id_bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """(N, k) integers below 2^bits as (N, ceil(k bits / 8)) bytes."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << bits:
        raise DistillError(f"teacher cache: ids must be below {1 << bits}, got {int(ids.max())}")
    each = (ids[..., None] >> np.arange(bits)) & 1
    flat = each.astype(np.uint8).reshape(len(ids), ids.shape[1] * bits)
    return np.packbits(flat, axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    each = np.unpackbits(packed, axis=1, count=k * bits, bitorder="little")
    return each.reshape(len(packed), k, bits).astype(np.int64) @ (1 << np.arange(bits))


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
