"""How the losses' Triton kernels are launched: sizes of blocks, and what every call tells of the
student.

Sizes are chosen from what the compiler reports of the compiled kernels, which
tests/test_kl_div_triton_compile.py holds them to, and not by timing in the user's process.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import TRITON_INTERPRETED
from ...cells import compute_dtype
from ...memory import plain
from .options import Options
from .ranks import PHASES, Split
from .rows import Strides, valid_rows


class Blocks(NamedTuple):
    """Rows of a program, columns it takes at once, and its warps."""

    rows: int
    columns: int
    warps: int


# By the widest vocabulary they are for. A thread has up to 8 elements of each sum. Wide rows have
# many warps: fewer of them are under way, and their later sweeps find more of them in the cache.
TABLE = {
    256: Blocks(4, 128, 4),
    1024: Blocks(2, 512, 4),
    8192: Blocks(1, 1024, 4),
    32768: Blocks(1, 2048, 8),
    math.inf: Blocks(1, 4096, 16),
}
# The interpreter is as fast as NumPy: few operations on large arrays.
INTERPRETED = Blocks(32, 2048, 4)


def choose(V: int, N: int, interpreted: bool, largest: int | None = None) -> Blocks:
    """Of no more than `largest` columns."""
    if interpreted:
        columns = min(power_of_two(V), INTERPRETED.columns)
        fitting = INTERPRETED.rows * INTERPRETED.columns // columns
        return Blocks(min(power_of_two(N), fitting), columns, INTERPRETED.warps)
    return next(b for widest, b in TABLE.items() if widest >= V or b.columns == largest)


def power_of_two(width: int) -> int:
    """The smallest that holds `width`."""
    return 1 << max(0, width - 1).bit_length()


class StudentCall:
    """Arguments and flags that describe the student, in the order of the kernels, and the loss."""

    def __init__(
        self,
        function: str,
        student: Tensor,
        labels: Tensor | None,
        row_weight: Tensor | None,
        options: Options,
        want_grad: bool,
        split: Split | None,
    ):
        from .triton_rows import Given

        self.student, self.options, self.want_grad = student, options, want_grad
        self.split = split
        self.shape, self.N, self.V = (
            student.shape[:-1],
            student.shape[:-1].numel(),
            student.shape[-1],
        )
        self.dtype = compute_dtype(student.dtype)
        self.labels, self.row_weight = plain(labels, torch.int64), plain(row_weight, self.dtype)
        if student.device.type == "cpu" and split is None:
            valid_rows(function, student, labels, self.V, options.ignore_index)
        self.factor = self._factor()
        unused = self.factor
        self.row_loss = torch.empty(self.N, dtype=self.dtype, device=student.device)
        self.given = Given(
            unused if self.labels is None else self.labels,
            unused if self.row_weight is None else self.row_weight,
            self.factor,
        )

    def _factor(self) -> Tensor:
        """Of the reduction, on the device: nothing is waited for."""
        options, rows = self.options, max(1, self.N)
        if options.reduction == "mean" and self.labels is not None:
            valid = (self.labels != options.ignore_index).sum()
            return valid.clamp(min=1).to(self.dtype).reciprocal()
        mean = options.reduction in ("mean", "batchmean")
        value = 1 / rows if mean else 1.0
        return torch.full((), value, dtype=self.dtype, device=self.student.device)

    def loss(self) -> Tensor:
        if self.options.reduction == "none":
            return self.row_loss.view(self.shape)
        return (self.row_loss.sum(dtype=torch.float64) * self.factor).to(self.dtype)

    def shared(self) -> Any:
        """With other processes, which have the other columns."""
        from .triton_split import Split

        unused = self.factor
        if self.split is None:
            return Split(unused, unused)
        z_words = self.split.z_words
        return Split(self.split.sums, unused if z_words is None else z_words)

    def numbers(self) -> tuple[float, ...]:
        """Of the divergence: scale, 1 / T and the gains of loss and gradient, mix. Of the hard
        label."""
        o, T = self.options, self.options.temperature
        mix = 1 - o.beta if o.divergence == "skew_reverse" else o.beta
        return (
            *(math.log2(math.e) / T, 1 / T, o.kl_weight * T * T, o.kl_weight * T, mix),
            *(o.ce_weight, o.label_smoothing, o.z_loss, o.softcap or 1.0),
        )

    def how(self, V: int, largest: int | None = None) -> tuple[Any, int]:
        """What a kernel over V columns is compiled for, and its warps; `largest` is that of
        choose()."""
        import triton.language as tl

        from .triton_rows import How

        options, hard = self.options, self.options.ce_weight != 0
        blocks = choose(V, self.N, TRITON_INTERPRETED, largest)
        how = How(
            dtype=tl.float64 if self.dtype == torch.float64 else tl.float32,
            rows=blocks.rows,
            block=blocks.columns,
            divergence=options.divergence,
            grad=self.want_grad,
            labelled=self.labels is not None,
            weighted=self.row_weight is not None,
            capped=options.softcap is not None,
            teacher_capped=options.teacher_softcap is not None,
            hard=hard,
            own=hard and options.temperature != 1,
            smooth=hard and options.label_smoothing != 0,
            emulated=TRITON_INTERPRETED,
            phase="whole" if self.split is None else PHASES[self.split.phase],
        )
        return how, blocks.warps


def logits(tensor: Tensor, strides: Strides) -> Any:
    from .triton_rows import Logits

    return Logits(tensor, tensor.shape[-1], *strides)


def first_bits(temperature: float) -> float:
    """Of log2(e) / T."""
    mantissa, exponent = math.frexp(math.log2(math.e) / temperature)
    return math.ldexp(math.floor(mantissa * 4096), exponent - 12)
