"""What a linear loss takes, in the order in which every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..kl_div import options, rows
from ..kl_div.ranks import Shard
from ..topk_kl_div.arguments import check_ids


class Inputs(NamedTuple):
    """hidden (..., E), weight (V, E), bias (V,), row_weight (...). The others make the target: a
    teacher's head with an E and a V of its own; topk_logprobs and topk_ids (..., K) and
    tail_logmass (...); labels (...). numbers: where given, the options' are read there
    (kl_div/options.py)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    topk_logprobs: Tensor | None
    topk_ids: Tensor | None
    tail_logmass: Tensor | None
    labels: Tensor | None
    row_weight: Tensor | None
    numbers: Tensor | None = None

    def read(self) -> dict[str, Tensor]:
        """By name the tensors that are there and have numbers a kernel reads."""
        others = ("topk_ids", "labels", "row_weight", "numbers")
        named = self._asdict().items()
        return {name: t for name, t in named if t is not None and name not in others}

    @property
    def function(self) -> str:
        """The public function that was called."""
        if self.teacher_hidden is not None:
            return "linear_kl_div"
        return "linear_cross_entropy" if self.topk_ids is None else "linear_topk_kl_div"


class Settings(NamedTuple):
    """`support` is that of topk_kl_div. chunk_rows 0 leaves the choice to plan.py. With a shard the
    heads are this rank's rows of them."""

    options: options.Options
    support: str = "tail"
    chunk_rows: int = 0
    shard: Shard | None = None


# The same for torch.library, options one by one; no shard.
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight,"
    " Tensor? teacher_bias, Tensor? topk_logprobs, Tensor? topk_ids, Tensor? tail_logmass,"
    f" Tensor? labels, Tensor? row_weight, Tensor? numbers, {options.SCHEMA}, str support,"
    " int chunk_rows"
)
# What a gradient can be wanted of.
DIFFERENTIABLE = ("hidden", "weight", "bias")


def valid_rows(inputs: Inputs, settings: Settings, look: bool = True) -> Tensor:
    """Which rows are not ignored. A label or a word out of range is an error, where we may look at
    values."""
    function, ignore_index = inputs.function, settings.options.ignore_index
    V = inputs.weight.shape[0] if settings.shard is None else settings.shard.V
    if inputs.topk_ids is not None and look:
        check_ids(function, inputs.topk_ids, V)
    return rows.valid_rows(function, inputs.hidden, inputs.labels, V, ignore_index, look)
