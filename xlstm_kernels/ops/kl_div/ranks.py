"""Losses of rows whose columns, the vocabulary, are split over the ranks of `torch.distributed`.

A kernel runs in phases (csrc/launch.h). Each rank finds what its columns are to the sums of a row;
two all-reduces, of shifts and of sums, make them the row's:
    sum = sum_ranks 2^(shift_rank - shift) sum_rank
and one more where a mixture of the two distributions has sums of its own. Then every rank has the
row's loss, and its columns of the gradient. All of it is float64, some hundred bytes a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...arguments import check_process_group
from ...cells import compute_dtype
from . import autograd
from .autograd import Operators, Others
from .options import Options
from .rows import sum_rows, valid_rows, weigh_rows

# In the order of csrc/launch.h's enum and struct.
PHASES = ("whole", "sums", "mixed", "loss")
_SUMS, _MIXED, _LOSS = 1, 2, 3
_SHIFTS, _SUMMED, _OF_MIXTURE = slice(0, 4), slice(4, 12), slice(12, 14)
_FIELDS = 14
_MIXTURES = ("js", "skew", "skew_reverse", "tv")
# Labels as a kernel takes them, whatever ignore_index is.
_IGNORED, _ELSEWHERE = -1, -2


class Shard(NamedTuple):
    """The columns of this rank: the vocabulary is that of all ranks, one after the other."""

    group: dist.ProcessGroup
    rank: int
    widths: tuple[int, ...]  # of each rank
    teacher_widths: tuple[int, ...]

    @property
    def first(self) -> int:
        return sum(self.widths[: self.rank])

    @property
    def V(self) -> int:
        return sum(self.widths)

    def labels(self, labels: Tensor | None, ignore_index: int) -> Tensor | None:
        if labels is None:
            return None
        labels = labels.to(torch.int64)
        column = labels - self.first
        elsewhere = (column < 0) | (column >= self.widths[self.rank])
        ignored = labels == ignore_index
        return column.masked_fill(elsewhere, _ELSEWHERE).masked_fill(ignored, _IGNORED)


class Split(NamedTuple):
    """What a kernel takes beside a call's own arguments."""

    phase: int
    sums: Tensor  # (..., _FIELDS)
    z_words: Tensor | None  # (..., K): the logits of a teacher's words
    shard: Shard


def find_shard(
    function: str,
    group: dist.ProcessGroup | None,
    student: Tensor,
    width: int,
    teacher_width: int | None,
    options: tuple[Any, ...],
    facts: Mapping[str, int] = MappingProxyType({}),
) -> Shard | None:
    """None without a group. What has to be the same on every rank, lest one waits for another in
    vain, is compared: the rows of `student`, `options`, and `facts` by name."""
    if group is None:
        return None
    check_process_group(function, "process_group", group)
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{function}: torch.compile cannot trace process_group; call it outside of the graph"
        )
    facts = {
        "the number of rows": student.shape[:-1].numel(),
        "a checksum of the options": zlib.crc32(repr(options).encode()),
        **facts,
    }
    teacher_width = width if teacher_width is None else teacher_width
    own = torch.tensor([width, teacher_width, *facts.values()], device=student.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    widths, teacher_widths, *said = torch.stack(every, dim=1).tolist()
    for name, values in zip(facts, said, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{function}: {name} must be the same on all ranks of process_group, got {values}"
            )
    if widths[:-1] != teacher_widths[:-1]:
        raise ValueError(
            f"{function}: student and teacher must have equal parts of the vocabulary on all ranks"
            f" of process_group but the last, got {widths} and {teacher_widths} words"
        )
    return Shard(group, dist.get_rank(group), tuple(widths), tuple(teacher_widths))


def exchange(
    kernel: ModuleType,
    shard: Shard,
    student: Tensor,
    target: tuple[Tensor | None, ...],
    labels: Tensor | None,
    row_weight: Tensor | None,
    call: tuple[Any, ...],
) -> tuple[tuple[Any, ...], Split]:
    """What `forward` and `overwrite` of the kernel take for the loss of each row, once the ranks
    know its sums. `call` begins with the options."""
    options = _options(call)
    how = options._replace(reduction="none", ignore_index=_IGNORED)
    labels = shard.labels(labels, options.ignore_index)
    arguments = student, *target, labels, row_weight, *how, *call[len(options) :]
    ids = target[1] if len(target) > 1 else None
    sums = student.new_zeros((*student.shape[:-1], _FIELDS), dtype=torch.float64)
    z_words = None if ids is None else student.new_zeros(ids.shape, dtype=torch.float64)
    split = Split(_SUMS, sums, z_words, shard)
    kernel.forward(*arguments, False, split=split)
    _add_up(split, options.divergence == "reverse")
    if ids is None and options.divergence in _MIXTURES:
        kernel.forward(*arguments, False, split=split._replace(phase=_MIXED))
        mixed = split.sums[..., _OF_MIXTURE].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mixed, group=shard.group)
        split.sums[..., _OF_MIXTURE] = mixed
    return arguments, split._replace(phase=_LOSS)


def _options(call: tuple[Any, ...]) -> Options:
    return Options(*call[: len(Options._fields)])


def _add_up(split: Split, reverse: bool) -> None:
    """Of this rank's sums the row's; kl_div.cpp adds up the blocks of a row in the same way."""
    own, sums = split.sums[..., _SHIFTS], split.sums[..., _SUMMED]
    shifts = own.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(shifts, dist.ReduceOp.MAX, group=split.shard.group)
    # The sums of what is wholly masked are 0, or NaN where it holds one.
    drop = (own - shifts).masked_fill(own == -torch.inf, 0)
    (drop_s, drop_t, *_), (w_s, w_t, w_hard, _) = drop.unbind(-1), drop.exp2().unbind(-1)
    sum_s, sum_t, excess, gap, sum_hard, *others = sums.unbind(-1)
    if reverse:
        gap = torch.where(w_s == 0, 0, w_s * (gap + (drop_s - drop_t) * sum_s))
    else:
        gap = torch.where(w_t == 0, 0, w_t * (gap + (drop_t - drop_s) * sum_t))
    excess = w_s * excess + (w_s - w_t) * sum_t
    scaled = [w_s * sum_s, w_t * sum_t, excess, gap, w_hard * sum_hard, *others]
    total = torch.stack(scaled, dim=-1)
    if split.z_words is not None:
        total = torch.cat([total, split.z_words], dim=-1)
    dist.all_reduce(total, group=split.shard.group)
    split.sums[..., _SHIFTS] = shifts
    split.sums[..., _SUMMED] = total[..., : len(scaled)]
    if split.z_words is not None:
        split.z_words.copy_(total[..., len(scaled) :])


def operators(module: Callable[[str], ModuleType], scale: Callable[..., None]) -> Operators:
    """Those of a loss over ranks, `module` being that of a backend. Its options are (call, shard,
    valid): `call` as `exchange` takes it, and which rows are not ignored."""

    def run(student: Tensor, others: tuple[Any, ...], verb: str, *want_grad: bool) -> list[Tensor]:
        *target, labels, row_weight, call, shard, valid, backend = others
        reduction = _options(call).reduction
        weight = weigh_rows(row_weight, reduction, valid, compute_dtype(student.dtype))
        kernel = module(backend)
        arguments, split = exchange(kernel, shard, student, tuple(target), labels, weight, call)
        found = getattr(kernel, verb)(*arguments, *want_grad, split=split)
        rows, *grad = found if want_grad else [found]
        return [rows if reduction == "none" else sum_rows(rows), *grad]

    def forward(student: Tensor, *call: Any) -> list[Tensor]:
        *others, want_grad, backend = call
        return run(student, (*others, backend), "forward", want_grad)

    def overwrite(student: Tensor, *call: Any) -> Tensor:
        return run(student, call, "overwrite")[0]

    return Operators(forward, overwrite, scale)


def row_loss(
    function: str,
    student: Tensor,
    others: Others,
    call: tuple[Any, ...],
    shard: Shard | None,
    inplace_grad: bool,
    backend: str,
) -> Tensor:
    """As that of autograd.py, over ranks where there is a shard."""
    if shard is None:
        return autograd.row_loss(function, student, others, call, inplace_grad, backend)
    *_, labels, _ = others
    valid = valid_rows(function, student, labels, shard.V, _options(call).ignore_index)
    over = call, shard, valid
    return autograd.row_loss(f"{function} over ranks", student, others, over, inplace_grad, backend)


def whole(logits: Tensor, shard: Shard | None, teacher: bool = False) -> Tensor:
    """The columns of all ranks, on each; a gradient goes to this rank's."""
    if shard is None:
        return logits
    return _Whole.apply(logits, shard, shard.teacher_widths if teacher else shard.widths)


def enter(hidden: Tensor, shard: Shard | None) -> Tensor:
    """What is the same on all ranks, before each takes its own way: their gradients add up."""
    return hidden if shard is None else _Enter.apply(hidden, shard)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: Shard, widths: tuple[int, ...]) -> Tensor:
        ctx.columns = sum(widths[: shard.rank]), own.shape[-1]
        widest = own.new_zeros(*own.shape[:-1], max(widths))
        widest[..., : own.shape[-1]] = own
        every = [torch.empty_like(widest) for _ in widths]
        dist.all_gather(every, widest, group=shard.group)
        parts = (part[..., :width] for part, width in zip(every, widths, strict=True))
        return torch.cat(list(parts), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None, None]:
        return dwhole.narrow(-1, *ctx.columns), None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, None]:
        total = dhidden.contiguous().clone()
        dist.all_reduce(total, group=ctx.shard.group)
        return total, None
