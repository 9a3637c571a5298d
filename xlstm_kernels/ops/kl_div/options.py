"""What a call of kl_div is beyond its tensors."""

from __future__ import annotations

from typing import NamedTuple

# DIVERGENCES and REDUCTIONS in the order of csrc/launch.h's enums.
DIVERGENCES = ("forward", "reverse")
PLANNED_DIVERGENCES = ("js", "skew", "skew_reverse", "tv")
REDUCTIONS = ("none", "sum", "mean", "batchmean")


class Options(NamedTuple):
    divergence: str
    temperature: float
    ce_weight: float
    kl_weight: float
    ignore_index: int
    reduction: str
