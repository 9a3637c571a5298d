"""Schema, fake and backends of the linear losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from . import cpu, cuda, inputs, triton

FUNCTIONS = ("linear_kl_div", "linear_topk_kl_div", "linear_cross_entropy")
TABLE = {Backend.CPU: cpu, Backend.CUDA: cuda, Backend.TRITON: triton}
LINEAR_KL_DIV = Op("linear_kl_div", TABLE, FUNCTIONS)


def _fake_forward(*call: Any) -> list[Tensor]:
    tensors = inputs.Inputs(*call[: len(inputs.Inputs._fields)])
    *_, reduction, _, _, wanted, _ = call
    shape = tensors.hidden.shape[:-1] if reduction == "none" else ()
    loss = tensors.hidden.new_empty(shape, dtype=compute_dtype(tensors.hidden.dtype))
    parts = (tensors.hidden, tensors.weight, tensors.bias)
    return [
        loss,
        *(
            part.new_empty(part.shape)
            for part, want in zip(parts, wanted, strict=True)
            if want and part is not None
        ),
    ]


# The loss and, where wanted, its gradients by hidden, weight and bias. For reduction "none" the
# first is by each row's own loss, the others by the sum.
forward = define(
    LINEAR_KL_DIV,
    f"linear_kl_div_forward({inputs.SCHEMA}, bool[3] wanted, str backend) -> Tensor[]",
    _fake_forward,
)
