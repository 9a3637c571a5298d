"""The loss of logits that are there, in plain torch: the oracle of every other backend.

z = hidden weight^T + bias, in the compute dtype, of a weight rounded to the dtype of hidden; then
the reference of kl_div. It holds all logits.
"""

from __future__ import annotations

from torch import Tensor

from ...cells import compute_dtype, no_autocast
from ..kl_div import reference
from ..kl_div.options import Options
from .inputs import Inputs, valid_rows


def forward(inputs: Inputs, options: Options) -> Tensor:
    """The loss in the compute dtype: a scalar, or the leading shape for reduction "none"."""
    with no_autocast(inputs.hidden.device):
        valid_rows(inputs, options.ignore_index)
        student = _logits(inputs.hidden, inputs.weight, inputs.bias)
        if inputs.teacher_hidden is None or inputs.teacher_weight is None:
            teacher = student.detach()
        else:
            teacher = _logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)
        return reference.forward(student, teacher, inputs.labels, inputs.row_weight, options)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).mT
    return logits if bias is None else logits + bias.to(dtype)
