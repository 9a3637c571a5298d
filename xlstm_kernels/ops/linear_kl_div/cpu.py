"""Linear losses on CPU tensors: torch's products, and the row kernel of kl_div on each chunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import gemm
from ...memory import fresh_cpu, refused_by_cpu
from ..kl_div import cpu as rows
from ..kl_div.options import Options
from .chunks import Machine, run
from .inputs import Inputs

_MACHINE = Machine(gemm.product_dtype, gemm.multiply, fresh_cpu, rows.forward, rows.overwrite)


def supports(inputs: Inputs) -> str | None:
    tensors = inputs._asdict()
    heads = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    return refused_by_cpu(**{name: tensors[name] for name in heads if tensors[name] is not None})


def forward(*call: Any) -> list[Tensor]:
    count = len(Inputs._fields)
    *options, chunk_rows, wanted = call[count:]
    return run(Inputs(*call[:count]), Options(*options), chunk_rows, wanted, _MACHINE)
