"""Linear losses on CPU tensors: torch's products, and a row kernel on each chunk of logits."""

from __future__ import annotations

from functools import partial

from ...memory import refused_by_cpu
from ..kl_div import cpu as kl_div
from ..topk_kl_div import cpu as topk_kl_div
from .chunks import Kernels, run
from .inputs import Inputs

OVER_RANKS = True
forward = partial(run, Kernels(kl_div, topk_kl_div, on_host=True))


def supports(inputs: Inputs) -> str | None:
    return refused_by_cpu(**inputs.read())
