"""Linear losses on CUDA tensors: torch's products, a CUDA row kernel on each chunk of logits."""

from __future__ import annotations

from functools import partial

from ...memory import refused_by_cuda
from ..kl_div import cuda as kl_div
from ..topk_kl_div import cuda as topk_kl_div
from .chunks import Kernels, run
from .inputs import Inputs

OVER_RANKS = True
forward = partial(run, Kernels(kl_div, topk_kl_div, on_host=False))


def supports(inputs: Inputs) -> str | None:
    if (why := refused_by_cuda(**inputs.read())) or inputs.topk_logprobs is None:
        return why
    return topk_kl_div.supports(inputs.hidden, inputs.topk_logprobs)
