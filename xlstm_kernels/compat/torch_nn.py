"""`torch.nn.LSTM` on our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops.recurrence.api import lstm
from .swap import STEP, Found, Swap, Swapped, fused_backend, no_kernel

# Where our kernel is faster than what torch calls (oneDNN for dense float32 and bfloat16, a loop
# over steps for packed sequences and projections), measured on one core of an AVX-512 Xeon for B 1
# to 64, T 1 to 512, hidden sizes 16 to 1024. Elsewhere the gain is below 5 % or a loss.
MOST_SEQUENCES = {1: 8, 2: 4}  # by the number of directions
# On two cores torch shares out the products of one step, ours of a wide layer wait for one another:
# of hidden size 256 one sequence then trains at 0.91x, of 512 at 0.40x, four at 0.78x.
LARGEST_HIDDEN, LARGEST_ALONE = 256, 128
SHORTEST_TRAINED = 8
SHORTEST_PACKED = 16
LARGEST_PROJECTED = 128


class FusedLSTM(Swapped, nn.LSTM):
    """An nn.LSTM whose layers each run in one call of `xk.lstm`, where that is faster.

    The last state has the input's dtype, as nn.LSTM's has. Dropout draws what nn.LSTM draws.
    """

    replaced = nn.LSTM

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self._is_faster(input):
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        unbatched = input.dim() == 2
        if unbatched:
            self._check(input.unsqueeze(1 - self.batch_first), hx, 2)
            x_BTE = input.unsqueeze(0)
            hx = None if hx is None else tuple(part.unsqueeze(1) for part in hx)
        else:
            self._check(input, hx, 3)
            x_BTE = input if self.batch_first else input.transpose(0, 1)
        y_BTE, h, c = self._layers(x_BTE, hx, None)
        if unbatched:
            return y_BTE.squeeze(0), (h.squeeze(1), c.squeeze(1))
        # Contiguous, as nn.LSTM's is: programs call view on it.
        return y_BTE if self.batch_first else y_BTE.transpose(0, 1).contiguous(), (h, c)

    def _is_faster(self, input: Any) -> bool:
        """By shapes and dtypes alone. What nn.LSTM refuses is left to it."""
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if x.dim() not in ((2,) if packed else (2, 3)) or x.numel() == 0 or not x.is_cpu:
            return False
        weight: Any = self.weight_ih_l0
        trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if packed:
            return trained or len(input.batch_sizes) >= SHORTEST_PACKED
        B, T = (
            (1, len(x)) if x.dim() == 2 else (x.shape[:2] if self.batch_first else x.shape[1::-1])
        )
        if x.dtype == torch.bfloat16 and not trained:
            return False
        largest = LARGEST_ALONE if B == 1 else LARGEST_HIDDEN
        if self.hidden_size > largest:
            return False
        return most_sequences(self) >= B and (T >= SHORTEST_TRAINED or not trained)

    def _check(self, input: Tensor, hx: Any, dims: int) -> None:
        """nn.LSTM's own checks, in its words."""
        if hx is not None:
            if any(part.dim() != dims for part in hx):
                raise RuntimeError(
                    f"For {dims}-D input, hx and cx should be {dims}-D but got"
                    f" ({', '.join(f'{part.dim()}-D' for part in hx)})"
                )
            hx = hx if dims == 3 else tuple(part.unsqueeze(1) for part in hx)
            self.check_forward_args(input, hx, None)
        else:
            self.check_input(input, None)

    def _packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self.check_input(data, batch_sizes)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(data, hx, batch_sizes)
        S = int(batch_sizes[0]) if sorted_indices is None else len(sorted_indices)
        rows = Rows.of(batch_sizes, S, len(data), data.device)
        y, h, c = self._layers(data[rows.by_sequence].unsqueeze(0), hx, rows)
        packed = PackedSequence(
            y.squeeze(0)[rows.by_time], batch_sizes, sorted_indices, unsorted_indices
        )
        return packed, self.permute_hidden((h, c), unsorted_indices)

    def _layers(self, x: Tensor, hx: Any, rows: Rows | None) -> tuple[Tensor, Tensor, Tensor]:
        """All layers over x (B, T, E), or (1, N, E) of packed sequences, one after the other."""
        h_last, c_last = [], []
        directions = 2 if self.bidirectional else 1
        # Under autocast oneDNN rounds the state, and nn.LSTM's loop over steps does not.
        kept = x.dtype if rows is not None or self.proj_size else None
        for layer in range(self.num_layers):
            if layer and self.training and self.dropout:
                x = self._drop(x, rows)
            outputs = []
            for direction in range(directions):
                cell = layer * directions + direction
                state = None if hx is None else (hx[0][cell], hx[1][cell])
                weights = self._weights(f"_l{layer}{'_reverse' * direction}")
                given = turn(x, rows) if direction else x
                y, h, c = run_direction(given, weights, state, rows, kept)
                outputs.append(turn(y, rows) if direction else y)
                h_last.append(h)
                c_last.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        return x, torch.stack(h_last).to(x.dtype), torch.stack(c_last).to(kept or x.dtype)

    def _weights(self, suffix: str) -> list[Tensor | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; by attribute, so that
        torch.func.functional_call and parametrizations are seen."""
        names = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
        return [getattr(self, name + suffix, None) for name in names]

    def _drop(self, x: Tensor, rows: Rows | None) -> Tensor:
        """Dropout in nn.LSTM's order of rows: the same seed then drops the same elements."""
        if rows is None:
            return F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)
        return F.dropout(x[:, rows.by_time], self.dropout)[:, rows.by_sequence]


@dataclass(frozen=True)
class Rows:
    """Where packed sequences stand: nn.LSTM packs by time, our kernels by sequence.

    Args:
        by_sequence: rows of the data packed by time, in the order of our packing; `by_time` undoes.
        reverse: rows of our packing with each sequence turned round.
        starts: `cu_seqlens`.
    """

    by_sequence: Tensor
    by_time: Tensor
    reverse: Tensor
    starts: Tensor

    @classmethod
    def of(cls, batch_sizes: Tensor, S: int, N: int, device: torch.device) -> Rows:
        """By shapes that are known without `batch_sizes`, so that torch.compile keeps one graph."""
        first_T = batch_sizes.cumsum(0) - batch_sizes
        lengths_S = (torch.arange(S).unsqueeze(1) < batch_sizes).sum(1)
        starts = F.pad(lengths_S.cumsum(0), (1, 0))
        row_N = torch.arange(N)
        sequence_N = torch.searchsorted(starts, row_N, right=True) - 1
        t_N = row_N - starts[sequence_N]
        by_sequence = first_T[t_N] + sequence_N
        reverse = starts[sequence_N + 1] - 1 - t_N
        found = by_sequence, by_sequence.argsort(), reverse, starts.int()
        return cls(*(index.to(device) for index in found))


def turn(x: Tensor, rows: Rows | None) -> Tensor:
    """Each sequence of x (B, T, ...) from its end to its beginning."""
    return x.flip(1) if rows is None else x[:, rows.reverse]


def run_direction(
    x_BTE: Tensor,
    weights: Sequence[Tensor | None],
    state: tuple[Tensor, Tensor] | None,
    rows: Rows | None,
    kept: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction: h (B, T, P), and the last h (B, P) and c (B, D). Between steps h
    has the dtype `kept`, or what autocast rounds to.

    With a projection h = W_hr u, the recurrence runs over u: W_hh h is (W_hh W_hr) u. Only the
    first h is no W_hr u; its part of the gates is added to those of the first step.
    """
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    assert weight_ih is not None and weight_hh is not None
    D = weight_ih.shape[0] // 4
    gates = F.linear(x_BTE, weight_ih)
    if kept is not None:
        gates = gates.to(kept)
    if weight_hr is not None:
        if state is not None:
            h, c = state
            first = F.linear(h, weight_hh)
            if rows is None:
                gates[:, 0] += first
            else:
                gates = gates.index_add(1, rows.starts[:-1], first.unsqueeze(0))
            state = c.new_zeros(c.shape), c
        weight_hh = weight_hh @ weight_hr
    bias = None if bias_ih is None or bias_hh is None else (bias_ih + bias_hh).view(4, 1, D)
    given = None if state is None else tuple(part.unsqueeze(1) for part in state)
    y_BTHD, (h_BHD, c_BHD) = lstm(
        gates.view(*x_BTE.shape[:2], 4, 1, D),
        weight_hh.view(4, 1, D, D),
        bias,
        given,  # type: ignore[arg-type]
        cu_seqlens=None if rows is None else rows.starts,
    )
    y, h = y_BTHD.squeeze(2), h_BHD.squeeze(1)
    if weight_hr is not None:
        y, h = F.linear(y, weight_hr), F.linear(h.to(y.dtype), weight_hr)
    return y, h, c_BHD.squeeze(1)


def most_sequences(layer: nn.LSTM) -> int:
    return MOST_SEQUENCES[2 if layer.bidirectional else 1]


LEFT: dict[type, str] = {
    nn.GRU: "no kernel for this cell",
    nn.GRUCell: "no kernel for this cell",
    nn.RNN: "no kernel for this cell",
    nn.RNNCell: "no kernel for this cell",
    nn.LSTMCell: STEP,
}


KNOWN = tuple(f"{known.__module__}.{known.__name__}" for known in (nn.LSTM, *LEFT))


def find(layer: Any) -> Found:
    if type(layer) in LEFT:
        return LEFT[type(layer)]
    weight: Any = layer.weight_ih_l0
    backend = fused_backend("recurrence", weight, weight, "lstm")
    if backend is None:
        return no_kernel("lstm", weight)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"measured: torch's is faster in {weight.dtype}"
    if layer.proj_size and layer.hidden_size > min(LARGEST_PROJECTED, 4 * layer.proj_size):
        return (
            f"measured: torch's is faster with a projection from {layer.hidden_size} to"
            f" {layer.proj_size}"
        )
    when = " in training" if weight.dtype == torch.bfloat16 else ""
    dense = f"up to {most_sequences(layer)} sequences at once{when}, and "
    if layer.hidden_size > LARGEST_HIDDEN:
        dense = ""
    return Swap(FusedLSTM, backend, f"{dense}packed ones")
