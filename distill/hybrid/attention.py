"""Some rows of the matrices that attention, and the hybrid mixer, weigh values with.

A row is a distribution over the tokens that its query sees. Of an mLSTM it is

    M_tj = D_tj phi(q_t) phi(k_j) / (their sum over j),  D_tj = f_{j+1} ... f_t i_j

Time and memory are those of the rows, O(R T) a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import DistillError

PARTS = ("mixer", "mlstm")
# Below it a weight is this: its logarithm then has a gradient of 0 instead of none at all.
LEAST = 1e-30


@dataclass(frozen=True)
class Rows:
    """Queries at t_BR, of documents that begin at first_T for each token."""

    t_BR: Tensor
    first_T: Tensor

    @classmethod
    def sample(cls, input_ids: Tensor, count: int, cu_seqlens: Tensor | None) -> Rows:
        """As many as `count` of each sequence, evenly, from a place that its words decide.

        So ranks agree, a resumed run repeats itself, and it does not matter what a sequence shares
        its batch with.
        """
        T, device = input_ids.shape[1], input_ids.device
        R = min(count, T)
        begin_R = torch.arange(R, device=device) * T // R
        tokens_T = torch.arange(T, device=device)
        first_T = torch.zeros_like(tokens_T)
        if cu_seqlens is not None:
            first_T = cu_seqlens[torch.searchsorted(cu_seqlens[1:], tokens_T, right=True)]
        return cls(begin_R + input_ids.sum(1, keepdim=True) % (T // R), first_T)

    def of(self, x_BT: Tensor) -> Tensor:
        """(B, R, ...) of (B, T, ...)."""
        return x_BT[torch.arange(len(x_BT), device=x_BT.device)[:, None], self.t_BR]

    def seen(self, window: int | None = None, sinks: int = 0) -> Tensor:
        """(B, 1, R, T): the tokens of the query's document up to it; of them the last `window` and
        the first `sinks`."""
        j_T = torch.arange(len(self.first_T), device=self.t_BR.device)
        t_BR1, first_BR1 = self.t_BR[..., None], self.first_T[self.t_BR][..., None]
        seen_BRT = (j_T <= t_BR1) & (j_T >= first_BR1)
        if window is not None:
            seen_BRT &= (t_BR1 - j_T < window) | (j_T - first_BR1 < sinks)
        return seen_BRT[:, None]


@dataclass(frozen=True)
class SoftmaxAttention:
    """What a layer computed its attention from; G heads of keys, H of queries."""

    q_BTHD: Tensor
    k_BTGD: Tensor
    scale: float
    window: int | None = None
    sinks: int = 0

    def weights(self, rows: Rows, part: str = "mixer") -> Tensor:
        """(B, H, R, T). It has no parts."""
        q_BRHD, k_BTGD = wide(rows.of(self.q_BTHD)), wide(self.k_BTGD)
        k_BTHD = k_BTGD.repeat_interleave(q_BRHD.shape[2] // k_BTGD.shape[2], dim=2)
        scores_BHRT = torch.einsum("brhd,bthd->bhrt", q_BRHD, k_BTHD) * self.scale
        hidden = ~rows.seen(self.window, self.sinks)
        return scores_BHRT.masked_fill(hidden, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class MixerAttention:
    """What a `HybridMixer` computed from: its window, features and gates before any function."""

    local: SoftmaxAttention
    phi_q_BTHD: Tensor
    phi_k_BTHD: Tensor
    i_BTH: Tensor
    f_BTH: Tensor
    o_BTH1: Tensor
    input_gate: str

    def weights(self, rows: Rows, part: str = "mixer") -> Tensor:
        """(B, H, R, T): of the whole "mixer", or of its "mlstm" alone."""
        if part not in PARTS:
            raise DistillError(f"loss attention: part must be one of {PARTS}, got {part!r}")
        mlstm_BHRT = self._log_mlstm(rows).softmax(-1)
        if part == "mlstm":
            return mlstm_BHRT
        o_BHR1 = wide(rows.of(self.o_BTH1)).transpose(1, 2)
        return torch.lerp(self.local.weights(rows), mlstm_BHRT, o_BHR1)

    def _log_mlstm(self, rows: Rows) -> Tensor:
        phi_q_BRHD, phi_k_BTHD = wide(rows.of(self.phi_q_BTHD)), wide(self.phi_k_BTHD)
        alike_BHRT = torch.einsum("brhd,bthd->bhrt", phi_q_BRHD, phi_k_BTHD)
        i_BHT, f_BHT = (wide(x).transpose(1, 2) for x in (self.i_BTH, self.f_BTH))
        log_i_BHT = F.logsigmoid(i_BHT) if self.input_gate == "sigmoid" else i_BHT
        seen_B1RT = rows.seen()
        # log f summed from the query back to j, not as a difference of sums from the beginning,
        # which would leave no digits of it.
        log_f_BHRT = F.logsigmoid(f_BHT)[:, :, None].masked_fill(~seen_B1RT, 0)
        kept_BHRT = log_f_BHRT.flip(-1).cumsum(-1).flip(-1)
        after_BHRT = F.pad(kept_BHRT[..., 1:], (0, 1))
        scores_BHRT = alike_BHRT.clamp_min(LEAST).log() + after_BHRT + log_i_BHT[:, :, None]
        return scores_BHRT.masked_fill(~seen_B1RT, float("-inf"))


def log_weights(weights_BHRT: Tensor, rows: Rows) -> Tensor:
    """-inf at what no query sees."""
    logs = weights_BHRT.clamp_min(LEAST).log()
    return logs.masked_fill(~rows.seen(), float("-inf"))


def wide(x: Any) -> Tensor:
    """At least float32: a sum of squares of 16 bits loses most of them."""
    return x if x.itemsize >= 4 else x.float()
