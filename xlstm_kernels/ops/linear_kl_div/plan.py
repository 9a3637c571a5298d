"""How many rows a chunk has, from a byte model.

A chunk of C rows holds C (V + V') logits in float32, and nothing else of the loss grows with C. For
each chunk the products read the weights, and the sum of the weight's gradient moves through memory
twice, beside 8 C operations an element: from some hundred rows on the products hide it. So C is
what fits, beside that sum, into EAGER_SHARE of the memory that eager torch takes, or into
LEAST_BYTES where that is more, within limits of the machine. The gradient by the logits takes their
place on a host, and has its own on a GPU. All chunks are about as large: a short last one costs a
pass over the weights and the sum like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...cells import compute_dtype
from ..kl_div.ranks import Shard
from .inputs import Inputs


class Limits(NamedTuple):
    """On the rows of a chunk."""

    least: int
    most: int


# Of 16-bit products with V = 128256 and E = 1024, on one core with matrix units: 385 GFLOP/s for 64
# rows, 530 for 128, 700 for 256; float32 ones 133, 163, 185.
HOST_ROWS = Limits(128, 512)
# Predicted, not measured: of 790 TFLOP/s and 4.3 TB/s a product needs 184 operations for each byte
# it moves. A weight of 2 bytes is read for C of them a byte, a sum of 4 read and written for C / 4.
GPU_ROWS = Limits(1024, 4096)
ROWS_STEP = 32
# Tensors of N V elements that F.kl_div of log_softmax and softmax holds at its peak.
EAGER_TENSORS = 7
EAGER_SHARE = 0.09  # a tenth, and a margin
LEAST_BYTES = 64 << 20  # logits of no consequence
# Of a weight that is converted, and of its gradient's sum: large enough for a product at full
# speed, and for the allocator to give it back to the system at once.
BLOCK_BYTES = 40 << 20


def plan_rows(
    total: int,
    inputs: Inputs,
    wanted: list[bool],
    product_dtype: torch.dtype,
    shard: Shard | None,
    host: bool,
) -> int:
    """Rows of a chunk of `total`, the same on all ranks of a shard."""
    limits = HOST_ROWS if host else GPU_ROWS
    N, itemsize = inputs.hidden.shape[:-1].numel(), inputs.hidden.dtype.itemsize
    sum_itemsize = compute_dtype(inputs.hidden.dtype).itemsize
    (V, E), weight_dtype = inputs.weight.shape, inputs.weight.dtype
    teacher_V = 0 if inputs.teacher_weight is None else inputs.teacher_weight.shape[0]
    if shard is not None:
        V, teacher_V = max(shard.widths), max(shard.teacher_widths) if teacher_V else 0
    budget = EAGER_SHARE * EAGER_TENSORS * N * V * itemsize
    if wanted[1] and weight_dtype.itemsize != sum_itemsize:
        budget -= min(sum_itemsize * V * E + BLOCK_BYTES, itemsize * N * V)
    own = 0 if host or product_dtype.itemsize == sum_itemsize else product_dtype.itemsize * V
    rows = int(max(budget, LEAST_BYTES) / (sum_itemsize * (V + teacher_V) + own * any(wanted)))
    rows = min(max(rows // ROWS_STEP * ROWS_STEP, limits.least), limits.most)
    chunks = max(1, math.ceil(total / rows))
    return math.ceil(total / chunks / ROWS_STEP) * ROWS_STEP


def holds_rows(inputs: Inputs, wanted: list[bool], product_dtype: torch.dtype, total: int) -> bool:
    """Whether the gradient by the logits of all rows is kept for one product with it, so that the
    weight's needs no sum in a wider dtype. A bias's is a sum of what is not rounded."""
    _, want_weight, want_bias = wanted
    E, sum_itemsize = inputs.hidden.shape[-1], compute_dtype(inputs.hidden.dtype).itemsize
    narrow = product_dtype.itemsize < sum_itemsize and inputs.weight.dtype == product_dtype
    fits = total * product_dtype.itemsize <= E * sum_itemsize
    return want_weight and not want_bias and narrow and fits


def blocks(V: int, E: int) -> Iterator[slice]:
    """The vocabulary in parts of some BLOCK_BYTES of float32."""
    rows = max(1, BLOCK_BYTES // (4 * E))
    for begin in range(0, V, rows):
        yield slice(begin, min(begin + rows, V))
