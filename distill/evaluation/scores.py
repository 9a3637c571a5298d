"""How well a model predicts held-out text: bits per byte, its first choices, and the teacher's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.corpus import Document
from distill.errors import DistillError, NotFinite


@dataclass
class Score:
    """Sums over the predicted tokens of a document, or of several.

    nats: of the text's code length; correct: how often the likeliest token is the text's, agreed:
    the teacher's (None without one).
    """

    n_bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    correct: int = 0
    agreed: int | None = None

    @property
    def bits_per_byte(self) -> float:
        """Code length of the text over its size: what it is does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.n_bytes

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens

    @property
    def agreement(self) -> float | None:
        return None if self.agreed is None else self.agreed / self.tokens

    def as_dict(self) -> dict[str, Any]:
        rates = ("bits_per_byte", "accuracy", "agreement")
        return asdict(self) | {name: getattr(self, name) for name in rates}


def total(scores: Iterable[Score]) -> Score:
    """Of all of them together."""
    whole = Score()
    for score in scores:
        whole.n_bytes += score.n_bytes
        whole.tokens += score.tokens
        whole.nats += score.nats
        whole.correct += score.correct
        if score.agreed is not None:
            whole.agreed = (whole.agreed or 0) + score.agreed
    return whole


@dataclass(frozen=True)
class Scores:
    """A model's `Score` of each document by its path, and of groups of them and all together."""

    documents: dict[str, Score]
    wall_s: float

    @property
    def total(self) -> Score:
        return total(self.documents.values())

    @property
    def groups(self) -> dict[str, Score]:
        """By the first folder of the path, where it has one."""
        names = sorted({path.partition("/")[0] for path in self.documents if "/" in path})
        return {
            name: total(s for path, s in self.documents.items() if path.startswith(f"{name}/"))
            for name in names
        }

    @property
    def bits_per_byte(self) -> float:
        return self.total.bits_per_byte

    @property
    def accuracy(self) -> float:
        return self.total.accuracy

    @property
    def agreement(self) -> float | None:
        return self.total.agreement

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = {"groups": self.groups, "documents": self.documents}
        nested = {
            part: {name: score.as_dict() for name, score in scores.items()}
            for part, scores in parts.items()
        }
        return self.total.as_dict() | {"wall_s": self.wall_s} | nested


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    teacher: Any = None,
    length: int = 512,
    rows: int = 8,
    overlap: int = 0,
    after_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score each document by itself; each of its tokens is predicted exactly once.

    Args:
        model, teacher: causal language models of transformers, hybrids among them.
        tokenizer: of transformers; its bos_token, or else its eos_token, stands before each
            document. None: the ids are the text's bytes. Where nothing stands before a document,
            its first token is not predicted.
        documents: as `distill.data.corpus.read_documents` gives them.
        length, rows: `rows` windows of at most `length` tokens are read at once.
        overlap: how many of these have been predicted by the window before, and only give context.
        after_batch: called with the number of tokens predicted so far, and of all.

    Raises:
        DistillError: there is nothing to predict, or a model gives NaN.
    """
    if not 0 <= overlap < length:
        raise DistillError(
            f"evaluate: overlap must be at least 0 and below {length}, got {overlap}"
        )
    for given in (model, teacher):
        require_positions("evaluate", given, length)
    began = time.perf_counter()
    scores: dict[str, Score] = {}
    windows: list[_Window] = []
    for document in documents:
        ids, n_bytes = encode(tokenizer, document)
        score = scores[document.path] = Score(n_bytes, len(ids) - 1)
        score.agreed = None if teacher is None else 0
        windows += _windows(score, torch.tensor(ids), length, overlap)
    if not windows:
        raise DistillError("evaluate: documents must have at least two tokens, got none that has")
    # Windows of like length together, so that little is padded.
    windows.sort(key=lambda window: -len(window.ids))
    n_tokens, done = sum(len(window.ids) - 1 - window.skipped for window in windows), 0
    modes = [(m, m.training) for m in (model, teacher) if m is not None]
    for given, _ in modes:
        given.eval()
    try:
        for begin in range(0, len(windows), rows):
            done += _score_batch(model, teacher, windows[begin : begin + rows])
            after_batch(done, n_tokens)
    finally:
        for given, training in modes:
            given.train(training)
    for path, score in scores.items():
        if not math.isfinite(score.nats):
            raise NotFinite(f"evaluate: the model must give finite logits, got none in {path}")
    return Scores({path: s for path, s in scores.items() if s.tokens}, time.perf_counter() - began)


def encode(tokenizer: Any, document: Document) -> tuple[list[int], int]:
    """Ids, the first of which is not predicted, and the bytes that the others stand for."""
    n_bytes = len(document.text)
    if tokenizer is None:
        return list(document.text), n_bytes - 1
    ids = words(tokenizer, document.text.decode())
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is not None:
        return [start, *ids], n_bytes
    return ids, n_bytes - len(tokenizer.decode(ids[:1]).encode())


def require_positions(operation: str, model: Any, length: int) -> None:
    """Raises DistillError unless a model, or one of this configuration, which has learned its
    positions, has so many."""
    most = getattr(getattr(model, "config", model), "n_positions", None)
    if most is not None and length > most:
        raise DistillError(
            f"{operation}: length must be at most {most}, the positions of the model, got {length}"
        )


def words(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone; without a tokenizer its bytes."""
    if tokenizer is None:
        return list(text.encode())
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


@dataclass(frozen=True)
class _Window:
    """Ids of a piece of a document; the first `skipped` of its predictions do not count."""

    score: Score
    ids: Tensor
    skipped: int


def _windows(score: Score, ids_N: Tensor, length: int, overlap: int) -> list[_Window]:
    windows, next_predicted = [], 1
    while next_predicted < len(ids_N):
        begin = max(0, next_predicted - 1 - overlap)
        end = min(begin + length + 1, len(ids_N))
        windows.append(_Window(score, ids_N[begin:end], next_predicted - 1 - begin))
        next_predicted = end
    return windows


def _score_batch(model: Any, teacher: Any, windows: list[_Window]) -> int:
    """Adds to the windows' scores; returns how many tokens were predicted."""
    # No mask for what is padded: it stands behind all that counts, and nothing looks ahead.
    ids_BT = torch.nn.utils.rnn.pad_sequence([w.ids for w in windows], batch_first=True)
    logits_BTV = _logits(model, ids_BT)
    top_BT = logits_BTV.argmax(dim=-1)
    labels_BT = ids_BT[:, 1:].to(logits_BTV.device)
    logits_NV = logits_BTV.flatten(0, 1).float()
    nats_N = F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none")
    nats_BT = nats_N.view_as(labels_BT).double().cpu()
    correct_BT = (top_BT == labels_BT).cpu()
    agreed_BT = None
    if teacher is not None:
        agreed_BT = top_BT.cpu() == _logits(teacher, ids_BT).argmax(dim=-1).cpu()
    count = 0
    for row, window in enumerate(windows):
        part = slice(window.skipped, len(window.ids) - 1)
        window.score.nats += float(nats_BT[row, part].sum())
        window.score.correct += int(correct_BT[row, part].sum())
        if agreed_BT is not None:
            assert window.score.agreed is not None
            window.score.agreed += int(agreed_BT[row, part].sum())
        count += part.stop - part.start
    return count


def _logits(model: Any, ids_BT: Tensor) -> Tensor:
    """Of all but the last token."""
    return model(ids_BT[:, :-1].to(model.device), use_cache=False).logits
