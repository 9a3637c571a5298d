"""How well a model predicts held-out text: nats of every token, bits per byte, agreement."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distill.corpus import TokenStream
from distill.demo.model import LanguageModel


@dataclass(frozen=True)
class Scores:
    """Per predicted token: nats_N float64 and the most likely token top_N int64; N = stream - 1."""

    nats_N: torch.Tensor
    top_N: torch.Tensor
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.nats_N) / self.wall_s


@torch.no_grad()
def score(
    model: LanguageModel,
    tokens_N: torch.Tensor,
    rows: int = 8,
    length: int = 128,
    after_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score a stream: each token but the first is predicted exactly once.

    The stream is cut into `rows` runs that are read side by side, `length` tokens at a time, with
    the recurrent state carried along; only the first token of a run is seen without a past.
    """
    began = time.perf_counter()
    n_predicted = len(tokens_N) - 1
    rows = min(rows, n_predicted)
    run = math.ceil(n_predicted / rows)
    # Predictions past the end are dropped again; token 0 only fills the rectangle.
    padded_N = F.pad(tokens_N, (0, rows * run + 1 - len(tokens_N)))
    inputs_BR, labels_BR = padded_N[:-1].view(rows, run), padded_N[1:].view(rows, run)
    nats_BR = torch.empty(rows, run, dtype=torch.float64)
    top_BR = torch.empty(rows, run, dtype=torch.int64)
    state = None
    for start in range(0, run, length):
        part = slice(start, start + length)
        logits_BTV, state = model(inputs_BR[:, part], state)
        labels_BT = labels_BR[:, part]
        logits_NV = logits_BTV.flatten(0, 1).float()
        nats_N = F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none")
        nats_BR[:, part] = nats_N.view_as(labels_BT)
        top_BR[:, part] = logits_BTV.argmax(dim=-1)
        done = min(start + length, run) * rows
        after_batch(min(done, n_predicted), labels_BT.numel())
    wall_s = time.perf_counter() - began
    return Scores(nats_BR.flatten()[:n_predicted], top_BR.flatten()[:n_predicted], wall_s)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Code length of a text in bits, per byte of the text; exact whatever the tokenizer."""
    return nats / math.log(2) / n_bytes


def bits_per_byte_by_file(nats_N: torch.Tensor, stream: TokenStream) -> list[float]:
    """Bits per byte of each file of the stream, its closing end-of-text included."""
    # nats_N[i] belongs to token i + 1
    bounds = [start - 1 for start in stream.starts]
    sums = [float(nats_N[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    return [bits_per_byte(nats, size) for nats, size in zip(sums, stream.n_bytes, strict=True)]


def agreement(top_N: torch.Tensor, teacher_top_N: torch.Tensor) -> float:
    """Share of tokens at which both models put the same token first."""
    return float((top_N == teacher_top_N).double().mean())
