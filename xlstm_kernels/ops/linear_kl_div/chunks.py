"""A linear loss over chunks of rows, on any machine with products and a row kernel.

Of each chunk, C rows:  z_s = x_s W_s^T + b_s,  z_t = x_t W_t^T + b_t,  then the row kernel, which
writes dz = dloss/dz_s over z_s, and  dx = dz W_s,  dW_s += dz^T x_s,  db_s += sum dz.  Only what is
wanted is computed. On a host, rows that are ignored or of weight 0 are left out of the products. To
know how many is to wait for a GPU: there they have logits that nobody reads, and zeros for dz.
Logits and sums are float32 (float64 for float64 hidden states); dz is rounded to bfloat16 where the
products are bfloat16. Rounded logits would cost digits of q - p as student and teacher come close;
a rounded q - p does not. Where dz of all rows is smaller than the sum of dW_s, the chunks leave it
there, and the products with it come once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ... import gemm
from ...cells import compute_dtype, no_autocast
from ...memory import fresh
from ..kl_div.autograd import Others
from ..kl_div.options import Options, with_numbers
from ..kl_div.ranks import Shard, exchange
from ..kl_div.rows import sum_rows, weigh_rows
from .inputs import Inputs, Settings, valid_rows
from .plan import blocks, holds_rows, plan_rows

Rows = slice | Tensor


class Kernels(NamedTuple):
    """The backend of kl_div and that of topk_kl_div: `forward` and `overwrite`. on_host: they run
    where we may look at values, and write a gradient of a narrower dtype over its own logits."""

    kl_div: ModuleType
    topk_kl_div: ModuleType
    on_host: bool


def run(kernels: Kernels, *call: Any, shard: Shard | None = None) -> list[Tensor]:
    """The loss and the wanted gradients by hidden, weight and bias. `call` is what SCHEMA says, and
    which gradients are wanted."""
    count = len(Inputs._fields)
    inputs = Inputs(*call[:count])
    *options, support, chunk_rows, wanted = call[count:]
    if inputs.numbers is not None:
        options[:] = with_numbers(tuple(options), inputs.numbers)
    settings = Settings(Options(*options), support, chunk_rows, shard)
    with no_autocast(inputs.hidden.device), torch.no_grad():
        return _run(inputs, settings, wanted, kernels)


def _run(inputs: Inputs, settings: Settings, wanted: list[bool], kernels: Kernels) -> list[Tensor]:
    options, dtype = settings.options, compute_dtype(inputs.hidden.dtype)
    leading, device = inputs.hidden.shape[:-1], inputs.hidden.device
    N, look = leading.numel(), device.type == "cpu" or settings.shard is not None
    valid = valid_rows(inputs, settings, look)
    weight = weigh_rows(inputs.row_weight, options.reduction, valid, dtype)
    weight_N = None if weight is None else weight.reshape(N)
    labels_N = None if inputs.labels is None else inputs.labels.reshape(N)
    student = Head(inputs.hidden, inputs.weight, inputs.bias, N, dtype)
    kept = None
    if kernels.on_host:
        kept = _kept(valid.reshape(N), weight_N)
    elif labels_N is not None or inputs.row_weight is not None:
        student.drop(valid.reshape(N), weight_N)
    total = N if kept is None else len(kept)
    held = holds_rows(inputs, wanted, student.dtype, total)
    gradients = Gradients(student, inputs, wanted, held, settings.shard)
    how = inputs, wanted, student.dtype, settings.shard, kernels.on_host
    size = min(total, settings.chunk_rows or plan_rows(total, *how))
    target = Target(inputs, settings, N, kernels)
    sizes = size, total if held else size
    z, dz, spare = _buffers(student, target, sizes, dtype, wanted, kernels.on_host)
    loss_N = torch.zeros(N, dtype=dtype, device=device)
    for chunk in _chunks(total, size):
        rows, count = chunk if kept is None else kept[chunk], chunk.stop - chunk.start
        x, z_CV = student.take(rows), z[:count]
        dz_CV = None if dz is None else dz[chunk] if held else dz[:count]
        student.logits(x, z_CV)
        labels = None if labels_N is None else labels_N[rows]
        weight = None if weight_N is None else weight_N[rows]
        loss_N[rows] = target.loss(rows, z_CV, spare[:count], labels, weight, dz_CV)
        if dz_CV is not None and not held:
            gradients.add(rows, x, dz_CV, spare[:count])
    if held and dz is not None:
        rows = slice(0, N) if kept is None else kept
        gradients.add(rows, student.take(rows), dz, spare)
    reduced = options.reduction != "none"
    loss = sum_rows(loss_N) if reduced else loss_N.reshape(leading)
    return [loss, *gradients.finish()]


class Head:
    """Hidden states and the matrix that turns them into logits of `dtype`."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, N: int, dtype: torch.dtype
    ):
        self.hidden_NE = hidden.reshape(N, hidden.shape[-1])
        # As autocast does: one copy for a call, where the dtypes differ.
        self.weight_VE = weight.to(hidden.dtype)
        self.bias = bias
        self.dropped_N1: Tensor | None = None
        self.V, self.E = weight.shape
        self.dtype = dtype  # a teacher's of another precision than the student's
        if compute_dtype(hidden.dtype) == dtype:
            self.dtype = gemm.product_dtype(hidden.dtype, hidden.device)

    def drop(self, valid_N: Tensor, weight_N: Tensor | None) -> None:
        """Rows that do not count count as zeros: NaN there would meet the zeros of dz."""
        counts = valid_N if weight_N is None else valid_N & (weight_N != 0)
        self.dropped_N1 = counts.logical_not().unsqueeze(1)

    def take(self, rows: Rows) -> Tensor:
        x_CE = self.hidden_NE[rows].to(self.dtype)
        return x_CE if self.dropped_N1 is None else x_CE.masked_fill(self.dropped_N1[rows], 0)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as the products want it, in parts where it must be converted first."""
        if self.weight_VE.dtype == self.dtype:
            yield slice(0, self.V), self.weight_VE
            return
        for block in blocks(self.V, self.E):
            yield block, self.weight_VE[block].to(self.dtype)

    def logits(self, x_CE: Tensor, out_CV: Tensor) -> None:
        if self.bias is not None:
            out_CV.copy_(self.bias.expand(out_CV.shape))
        for block, weight in self.blocks():
            gemm.multiply(out_CV[:, block], x_CE, weight.mT, self.bias is not None)


class Target:
    """What rows of the student's logits are compared with: a teacher's logits, its likeliest words,
    or nothing but labels."""

    def __init__(self, inputs: Inputs, settings: Settings, N: int, kernels: Kernels):
        options = settings.options._replace(reduction="none")
        self.head, self.shard = None, settings.shard
        # Without a teacher, or where nobody asks what it says: one of no words.
        self.kernel = kernels.topk_kl_div
        self.options: tuple[Any, ...] = (*options, "tail")
        nothing = inputs.hidden.new_empty(N, 0)
        self.words: Others = (nothing, nothing.to(torch.int64), None)
        if options.kl_weight == 0:
            return
        if inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
            teacher = inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias
            self.head = Head(*teacher, N, compute_dtype(inputs.hidden.dtype))
            self.kernel, self.options = kernels.kl_div, tuple(options)
        elif inputs.topk_logprobs is not None and inputs.topk_ids is not None:
            self.options = *options, settings.support
            tail = inputs.tail_logmass
            self.words = (
                inputs.topk_logprobs.reshape(N, inputs.topk_logprobs.shape[-1]),
                inputs.topk_ids.reshape(N, inputs.topk_ids.shape[-1]),
                None if tail is None else tail.reshape(N),
            )

    @property
    def V(self) -> int:
        """Width of the logits of its own."""
        return 0 if self.head is None else self.head.V

    def loss(
        self,
        rows: Rows,
        z_CV: Tensor,
        spare: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        dz_CV: Tensor | None,
    ) -> Tensor:
        """Of each row; its gradient is written to dz, which may be in the memory of z."""
        if self.head is not None:
            teacher_CV = spare[:, : self.head.V]
            self.head.logits(self.head.take(rows), teacher_CV)
            others: Others = (teacher_CV,)
        else:
            others = tuple(None if part is None else part[rows] for part in self.words)
        call, how = (z_CV, *others, labels, weight, *self.options), {}
        if self.shard is not None:
            parts = z_CV, others, labels, weight, self.options
            call, how["split"] = exchange(self.kernel, self.shard, *parts)
        if dz_CV is not None:
            return self.kernel.overwrite(*call, grad=dz_CV, **how)
        return self.kernel.forward(*call, False, **how)[0]


class Gradients:
    """What chunks add up to."""

    def __init__(
        self, head: Head, inputs: Inputs, wanted: list[bool], held: bool, shard: Shard | None
    ):
        self.head, self.inputs, self.shard = head, inputs, shard
        want_hidden, want_weight, want_bias = wanted
        dtype, device = compute_dtype(inputs.hidden.dtype), inputs.hidden.device
        self.dhidden = self.dbias = self.dweight = None
        self.begun = False
        if want_hidden:
            self.dhidden = torch.zeros_like(head.hidden_NE)
        if want_bias:
            self.dbias = torch.zeros(head.V, dtype=dtype, device=device)
        if want_weight:
            # Sums are the result itself where it has their dtype, or all rows come at once; else
            # blocks of their own, freed one after the other: both are never there as a whole.
            self.dweight = fresh(inputs.weight.shape, inputs.weight.dtype, device)
            self.sums = [
                (
                    block,
                    self.dweight[block]
                    if held or self.dweight.dtype == dtype
                    else fresh((block.stop - block.start, head.E), dtype, device),
                )
                for block in blocks(head.V, head.E)
            ]

    def add(self, rows: Rows, x_CE: Tensor, dz_CV: Tensor, spare: Tensor) -> None:
        if self.dbias is not None:
            self.dbias += dz_CV.sum(0)
        if dz_CV.dtype != self.head.dtype:
            rounded = spare.view(self.head.dtype)[:, : dz_CV.shape[1]]
            dz_CV = rounded.copy_(dz_CV)
        summing = None
        if self.dhidden is not None:
            dx_CE = x_CE.new_empty(x_CE.shape, dtype=compute_dtype(self.dhidden.dtype))
            for i, (block, weight) in enumerate(self.head.blocks()):
                gemm.multiply(dx_CE, dz_CV[:, block], weight, i > 0)
            if self.shard is not None:  # while the weight's product runs
                summing = dist.all_reduce(dx_CE, group=self.shard.group, async_op=True)
        if self.dweight is not None:
            for block, total in self.sums:
                gemm.multiply(total, dz_CV[:, block].mT, x_CE, self.begun)
        if summing is not None:
            summing.wait()
        if self.dhidden is not None:
            self.dhidden[rows] = dx_CE.to(self.dhidden.dtype)
        self.begun = True

    def finish(self) -> list[Tensor]:
        found = []
        if self.dhidden is not None:
            found.append(self.dhidden.reshape(self.inputs.hidden.shape))
        if self.dweight is not None:
            while self.sums:
                block, total = self.sums.pop()
                if not self.begun:
                    self.dweight[block] = 0
                elif total.dtype != self.dweight.dtype:
                    self.dweight[block] = total
            found.append(self.dweight)
        if self.dbias is not None and self.inputs.bias is not None:
            found.append(self.dbias.to(self.inputs.bias.dtype))
        return found


def _kept(valid_N: Tensor, weight_N: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, None for all."""
    kept = valid_N if weight_N is None else valid_N & (weight_N != 0)
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def _chunks(total: int, size: int) -> Iterator[slice]:
    for begin in range(0, total, max(size, 1)):
        yield slice(begin, min(begin + size, total))


def _buffers(
    student: Head,
    target: Target,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    wanted: list[bool],
    on_host: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """For a chunk's logits of the student; for the gradient by the logits of as many rows, or more,
    in the same memory where it fits, None where nobody wants it; and for the teacher's logits,
    which then make room for the gradient rounded. `sizes`: rows of both."""
    V, width, device = student.V, target.V, student.hidden_NE.device
    size, rows = sizes
    z = dz = fresh((size, V), dtype, device)
    if student.dtype != dtype and any(wanted):
        if wanted[2]:  # the bias's is a sum of what is not rounded
            width = max(width, (V * student.dtype.itemsize - 1) // dtype.itemsize + 1)
        elif on_host and rows == size:
            dz = z.view(student.dtype)[:, :V]
        else:
            dz = fresh((rows, V), student.dtype, device)
    return z, dz if any(wanted) else None, fresh((size, width), dtype, device)
