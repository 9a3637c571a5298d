"""Linear losses on CPU tensors: torch's products, and a row kernel on each chunk of logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import gemm
from ...memory import fresh_cpu, refused_by_cpu
from ..kl_div import cpu as kl_div
from ..kl_div.options import Options
from ..kl_div.ranks import Shard
from ..topk_kl_div import cpu as topk_kl_div
from .chunks import Machine, run
from .inputs import Inputs, Settings

OVER_RANKS = True
_MACHINE = Machine(gemm.product_dtype, gemm.multiply, fresh_cpu, kl_div, topk_kl_div)


def supports(inputs: Inputs) -> str | None:
    tensors = inputs._asdict()
    for name in ("topk_ids", "labels", "row_weight"):
        del tensors[name]
    return refused_by_cpu(**{name: t for name, t in tensors.items() if t is not None})


def forward(*call: Any, shard: Shard | None = None) -> list[Tensor]:
    count = len(Inputs._fields)
    *options, support, chunk_rows, wanted = call[count:]
    settings = Settings(Options(*options), support, chunk_rows, shard)
    return run(Inputs(*call[:count]), settings, wanted, _MACHINE)
