"""What a student reads: documents, their tokens, and rows of them as a function of the step."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.corpus import epoch_order
from distill.data.teacher import TeacherCache
from distill.data.tokens import Tokens
from distill.data.words import Words, each, join
from distill.errors import DistillError

IGNORED = -100  # a label that does not count, as in transformers


def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose ids are UTF-8's bytes; 256 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@dataclass(frozen=True)
class Batch:
    """Rows that one rank computes at once.

    input_ids and labels: (rows, length), or (1, rows * length) with `cu_seqlens`. A label is
    `IGNORED` where no token of the same document and row comes before it.
    positions: of each token in the text, (rows, length).
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor | None = None
    words: Words | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Tokens whose next word counts, and all."""
        labelled = int((self.labels[:, 1:] != IGNORED).sum())
        return {"labelled": labelled, "all": self.labels.numel()}

    def to(self, device: torch.device) -> Batch:
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        words = None if self.words is None else each(self.words, lambda part: part.to(device))
        ids, labels, positions = (
            part.to(device) for part in (self.input_ids, self.labels, self.positions)
        )
        return Batch(ids, labels, positions, cu_seqlens, words)


class Rows:
    """Windows of `length` tokens in an order drawn from (seed, epoch); a step takes `rows` of them.

    Which windows a step reads does not depend on how many ranks and micro-batches share them. Steps
    count from `first_step`, those of earlier stages: no window comes twice before all have come.
    """

    def __init__(
        self,
        tokens: Tokens,
        rows: int,
        length: int,
        seed: int,
        boundaries: bool = False,
        cache: TeacherCache | None = None,
    ):
        self.with_words = cache is not None  # whether batches bring words of the cache
        self.tokens, self.rows, self.length, self.seed = tokens, rows, length, seed
        self.boundaries, self.cache, self.first_step = boundaries, cache, 0
        self.windows = len(tokens.ids_N) // length
        if self.windows < rows:
            raise DistillError(
                f"data: a step of {rows} rows of {length} needs {rows * length} tokens,"
                f" the training files have {len(tokens.ids_N)}"
            )
        if cache is not None and len(cache) < self.windows * length:
            raise DistillError(
                f"teacher cache: {cache.folder} must have {self.windows * length} rows, as the"
                f" training files have tokens, got {len(cache)}; go on with `distill cache`"
            )

    def windows_of(self, step: int) -> Tensor:
        """(rows,): which windows a step reads."""
        epoch, index = divmod(self.first_step + step, self.windows // self.rows)
        order_W = epoch_order(self.seed, epoch, self.windows)
        return order_W[index * self.rows : (index + 1) * self.rows]

    def of_stage(self, first_step: int, with_words: bool) -> Rows:
        """The same windows, as a stage reads them."""
        rows = copy(self)
        rows.first_step, rows.with_words = first_step, with_words
        return rows

    def micro_batches(self, step: int, rank: int, ranks: int, micro_rows: int) -> list[Batch]:
        """A rank's share of a step, at most `micro_rows` at once."""
        mine = self.windows_of(step)[rank::ranks]
        return [self.batch(part) for part in mine.split(micro_rows)]

    def sizes(self, step: int) -> dict[str, int]:
        """Those of all rows of a step, as `Batch.sizes`."""
        begins = [int(window) * self.length for window in self.windows_of(step)]
        firsts = [first for begin in begins for first in self._firsts(0, begin)]
        tokens = self.rows * self.length
        count = len(firsts) if self.boundaries else self.rows
        return {"labelled": tokens - count, "all": tokens}

    def plain(self, windows_W: Tensor) -> Tensor:
        """(W, length) int64."""
        begins = [int(window) * self.length for window in windows_W]
        ids_WT = np.stack([self.tokens.ids_N[b : b + self.length] for b in begins])
        return torch.from_numpy(ids_WT.astype(np.int64))

    def batch(self, windows_W: Tensor) -> Batch:
        begins = [int(window) * self.length for window in windows_W]
        input_ids = self.plain(windows_W)
        positions = torch.tensor(begins)[:, None] + torch.arange(self.length)
        words = self._words(begins)
        if not self.boundaries:
            return Batch(input_ids, input_ids.clone(), positions, None, words)
        firsts = [at for row, begin in enumerate(begins) for at in self._firsts(row, begin)]
        labels = input_ids.flatten().clone()
        labels[firsts] = IGNORED
        cu_seqlens = torch.tensor([*firsts, labels.numel()], dtype=torch.int32)
        if words is not None:
            words = each(words, lambda part: part.flatten(0, 1)[None])
        return Batch(input_ids.view(1, -1), labels[None], positions, cu_seqlens, words)

    def describe(self, step: int) -> str:
        """Where the words of a step are from."""
        windows = sorted(self.windows_of(step).tolist())
        names = dict.fromkeys(
            name
            for window in windows
            for name in self.tokens.documents(window * self.length, (window + 1) * self.length)
        )
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        shown = ", ".join(map(str, windows[:8])) + ("..." if len(windows) > 8 else "")
        return f"windows {shown} of {', '.join(list(names)[:4])}{more}"

    def _firsts(self, row: int, begin: int) -> list[int]:
        """Where, in rows laid end to end, documents of a row begin; the row itself does."""
        starts = self.tokens.starts_D1
        low, high = np.searchsorted(starts, [begin + 1, begin + self.length])
        return [row * self.length + int(at) - begin for at in (begin, *starts[low:high])]

    def _words(self, begins: list[int]) -> Words | None:
        if self.cache is None or not self.with_words:
            return None
        parts = [self.cache.rows(begin, begin + self.length) for begin in begins]
        return join(parts, torch.stack)
