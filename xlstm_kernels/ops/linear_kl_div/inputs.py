"""The tensors of a linear loss, in the order in which every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """hidden (..., E), weight (V, E), bias (V,); the teacher's with an E and a V of its own, all
    None where hard labels are the only target; labels and row_weight (...)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    row_weight: Tensor | None

    @property
    def function(self) -> str:
        """The public function that was called."""
        return "linear_cross_entropy" if self.teacher_hidden is None else "linear_kl_div"


# The same for torch.library.
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight,"
    " Tensor? teacher_bias, Tensor? labels, Tensor? row_weight"
)
# What a gradient can be wanted of.
DIFFERENTIABLE = ("hidden", "weight", "bias")


def valid_rows(inputs: Inputs, ignore_index: int) -> Tensor | None:
    """Which rows are not ignored, None for all. A label out of range is an error."""
    if inputs.labels is None:
        return None
    labels, V = inputs.labels.to(torch.int64), inputs.weight.shape[0]
    valid = labels != ignore_index
    outside = valid & ((labels < 0) | (labels >= V))
    readable = not (torch.compiler.is_compiling() or labels.is_meta)
    if readable and bool(outside.any()):
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{inputs.function}: labels must be in [0, {V}) or ignore_index = {ignore_index},"
            f" got {int(labels.flatten()[row])} at row {row}"
        )
    return valid
