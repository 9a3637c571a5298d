"""What is kept of a teacher's distribution over the next word: the likeliest words, or drawn ones.

Drawn words are an unbiased stand-in: the mean over draws of KL's gradient is the gradient from the
whole distribution, which no number of likeliest words gives. Each of n words is drawn from a
stratum of its own, [j / n, (j + 1) / n) of the distribution laid end to end in the order of ids:
counts have the mean n p of independent draws, and no sum over them a larger variance. What is drawn
is a function of the seed and of the token's place in the text, and of no other draw.

Source: arXiv 2503.16870, which draws independently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.errors import DistillError

STEPS_PER_NAT = 2048
LEAST = -32.0  # log-probabilities below count as this
MOST_SAMPLES = (1 << 16) - 1
ROW_IDS = 64  # drawn ids that are packed together: any number of bits ends at a byte
DRAWN_ROWS = 64  # of a vocabulary in float64 at a time


class TopK(NamedTuple):
    """Of N tokens: the k likeliest next words, likeliest first, and all other words' share."""

    logprobs: Tensor  # (N, k) float32
    ids: Tensor  # (N, k) int64
    tail_logmass: Tensor  # (N,) float32, -inf where k is the whole vocabulary


class Samples(NamedTuple):
    """Of N tokens: the words that n draws came to, each once, ids rising, and then none."""

    logprobs: Tensor  # (N, n) float32, log(count / n); -inf for none
    ids: Tensor  # (N, n) int64; -1 for none


Words = TopK | Samples
Slice = Callable[[str, slice], np.ndarray]  # rows of a part of a shard


@dataclass(frozen=True)
class Likeliest:
    """The k likeliest. Ids take as many bits as the vocabulary needs, log-probabilities 16 bits
    each (steps of 2^-11 nats down to -32), what is left for all other words 32."""

    k: int
    format: ClassVar[str] = "xlstm_kernels.teacher/1"

    @property
    def width(self) -> int:
        """Words of a token, at most."""
        return self.k

    def words(self, logits_NV: Tensor, positions_N: Tensor | None = None) -> TopK:
        """Of a teacher's logits, any float dtype."""
        log_p = logits_NV.float().log_softmax(dim=-1)
        logprobs, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        # Of the others themselves: 1 less the sum would have no digits where the teacher is sure.
        tail = log_p.scatter(-1, ids, float("-inf")).logsumexp(dim=-1)
        return TopK(logprobs, ids, tail)

    def pack(self, words: TopK, vocabulary: int) -> dict[str, np.ndarray]:
        steps = (words.logprobs.float().clamp(LEAST, 0) * -STEPS_PER_NAT).round()
        return {
            "ids": pack_ids(words.ids.numpy(), id_bits(vocabulary)),
            "steps": steps.clamp_(max=2**16 - 1).numpy().astype(np.uint16),
            "tail_logmass": words.tail_logmass.float().numpy(),
        }

    def unpack(self, part: Slice, rows: slice, vocabulary: int) -> TopK:
        return TopK(
            torch.from_numpy(part("steps", rows).astype(np.float32) / -STEPS_PER_NAT),
            torch.from_numpy(unpack_ids(part("ids", rows), self.k, id_bits(vocabulary))),
            torch.from_numpy(part("tail_logmass", rows)),
        )

    def most_bytes(self, vocabulary: int) -> int:
        """That a token takes at most."""
        return -(-self.k * id_bits(vocabulary) // 8) + 2 * self.k + 4


@dataclass(frozen=True)
class Drawn:
    """`samples` draws from the teacher's distribution. Ids and counts take as many bits as they
    need, and a token as many of them as it has words, which 16 bits say."""

    samples: int
    seed: int = 0
    format: ClassVar[str] = "xlstm_kernels.drawn/1"

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise DistillError(
                f"words: samples must be from 1 to {MOST_SAMPLES}, got {self.samples}"
            )

    @property
    def width(self) -> int:
        return self.samples

    def words(self, logits_NV: Tensor, positions_N: Tensor | None = None) -> Samples:
        """Of a teacher's logits, any float dtype; positions: of the tokens in the text."""
        if positions_N is None:
            raise DistillError("words: positions must be given where words are drawn, got none")
        at_Nn = stratified(self.seed, positions_N, self.samples)
        parts = zip(logits_NV.split(DRAWN_ROWS), at_Nn.split(DRAWN_ROWS), strict=True)
        return join([self._counted(self._drawn(*part)) for part in parts])

    @staticmethod
    def _drawn(logits_NV: Tensor, at_Nn: Tensor) -> Tensor:
        """(N, n) ids, rising; -1 in rows that are not finite."""
        # In float64: in float32, 100 000 words would lose those of little mass.
        up_to_NV = logits_NV.double().softmax(dim=-1).cumsum(dim=-1)
        all_N1 = up_to_NV[:, -1:]
        ids_Nn = torch.searchsorted(up_to_NV, at_Nn * all_N1, right=True)
        return ids_Nn.masked_fill(~all_N1.isfinite(), -1)

    def _counted(self, ids_Nn: Tensor) -> Samples:
        begins_Nn = torch.ones_like(ids_Nn, dtype=torch.bool)
        begins_Nn[:, 1:] = ids_Nn[:, 1:] != ids_Nn[:, :-1]
        slot_Nn = begins_Nn.cumsum(dim=-1) - 1
        counts_Nn = torch.zeros_like(slot_Nn).scatter_add_(-1, slot_Nn, torch.ones_like(slot_Nn))
        logprobs_Nn = (counts_Nn.float() / self.samples).log()
        found_Nn = torch.full_like(ids_Nn, -1).scatter_(-1, slot_Nn, ids_Nn)
        return Samples(logprobs_Nn.masked_fill(ids_Nn < 0, float("nan")), found_Nn)

    def pack(self, words: Samples, vocabulary: int) -> dict[str, np.ndarray]:
        there = (words.ids >= 0).numpy()
        counts = (words.logprobs.double().exp() * self.samples).round().numpy()[there]
        ids = words.ids.numpy()[there]
        return {
            "words": there.sum(-1).astype(np.uint16),
            "ids": pack_ids(_in_rows(ids), id_bits(vocabulary)),
            "counts": pack_ids(_in_rows(counts.astype(np.int64) - 1), id_bits(self.samples)),
        }

    def unpack(self, part: Slice, rows: slice, vocabulary: int) -> Samples:
        words_N = part("words", slice(0, rows.stop)).astype(np.int64)
        begin, end = int(words_N[: rows.start].sum()), int(words_N.sum())
        packed = slice(begin // ROW_IDS, -(-end // ROW_IDS))
        inside = slice(begin % ROW_IDS, begin % ROW_IDS + end - begin)
        there = np.arange(self.samples) < words_N[rows.start :, None]

        def numbers(name: str, bits: int) -> np.ndarray:
            return unpack_ids(part(name, packed), ROW_IDS, bits).reshape(-1)[inside]

        ids = np.full(there.shape, -1)
        ids[there] = numbers("ids", id_bits(vocabulary))
        counts = np.zeros(there.shape)
        counts[there] = numbers("counts", id_bits(self.samples)) + 1
        shares = torch.from_numpy(counts).float() / self.samples
        return Samples(shares.log(), torch.from_numpy(ids))

    def most_bytes(self, vocabulary: int) -> int:
        return 2 + -(-self.samples * (id_bits(vocabulary) + id_bits(self.samples)) // 8)


Kind = Likeliest | Drawn  # which words are kept, and how they lie in a shard
KINDS: dict[str, type[Kind]] = {kind.format: kind for kind in (Likeliest, Drawn)}


def settings(kind: Kind) -> dict[str, str]:
    """What makes its words others, by name."""
    named = {"words": type(kind).__name__.lower()} | asdict(kind)
    return {name: str(value) for name, value in named.items()}


def each(words: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Words of the same kind, every part of them changed."""
    return type(words)(*(change(part) for part in words))


def join(parts: list[Any], how: Callable[..., Tensor] = torch.cat) -> Any:
    """Words of more tokens."""
    return type(parts[0])(*(how(part) for part in zip(*parts, strict=True)))


def stratified(seed: int, positions_N: Tensor, n: int) -> Tensor:
    """(N, n) float64: number j of a row in [j / n, (j + 1) / n), by seed and position alone."""
    j_n = torch.arange(n, device=positions_N.device)
    positions_N = positions_N.long()
    key_N = _mixed(_mixed(positions_N.new_tensor(seed)) + positions_N)
    bits_Nn = _mixed(key_N[:, None] + j_n) >> 32 & 0xFFFFFFFF
    return (j_n + (bits_Nn + 0.5) / 2.0**32) / n


def _mixed(x: Tensor) -> Tensor:
    """The next output of splitmix64 whose state is x (int64, which wraps around as it should).

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _right(x, shift)) * (factor - (1 << 64))
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (1 << 64 - bits) - 1


def id_bits(vocabulary: int) -> int:
    return max(1, (vocabulary - 1).bit_length())


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """(N, k) integers below 2^bits as (N, ceil(k bits / 8)) bytes."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << bits:
        raise DistillError(f"teacher cache: ids must be below {1 << bits}, got {int(ids.max())}")
    raw = ids.astype("<u4")[..., None].view(np.uint8)
    each = np.unpackbits(raw, axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(ids), ids.shape[1] * bits), axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    each = np.zeros((len(packed), k, 32), dtype=np.uint8)
    found = np.unpackbits(packed, axis=1, count=k * bits, bitorder="little")
    each[..., :bits] = found.reshape(len(packed), k, bits)
    raw = np.packbits(each, axis=-1, bitorder="little")
    return raw.view("<u4")[..., 0].astype(np.int64)


def _in_rows(ids: np.ndarray) -> np.ndarray:
    return np.pad(ids, (0, -len(ids) % ROW_IDS)).reshape(-1, ROW_IDS)
