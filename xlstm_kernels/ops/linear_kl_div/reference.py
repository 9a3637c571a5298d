"""The loss of logits that are there, in plain torch: the oracle of every other backend.

z = hidden weight^T + bias, in the compute dtype, of a weight rounded to the dtype of hidden; then
the reference of kl_div or topk_kl_div. It holds all logits.
"""

from __future__ import annotations

from torch import Tensor

from ...cells import compute_dtype, no_autocast
from ..kl_div import ranks
from ..kl_div import reference as kl_div
from ..topk_kl_div import reference as topk_kl_div
from .inputs import Inputs, Settings, valid_rows


def forward(inputs: Inputs, settings: Settings) -> Tensor:
    """The loss in the compute dtype: a scalar, or the leading shape for reduction "none"."""
    options, hard, shard = settings.options, (inputs.labels, inputs.row_weight), settings.shard
    with no_autocast(inputs.hidden.device):
        counts = valid_rows(inputs, settings)
        if inputs.row_weight is not None:
            counts = counts & (inputs.row_weight != 0)
        # Zeros for the others: NaN there would meet the zeros of their gradient.
        hidden = ranks.enter(inputs.hidden.masked_fill(~counts.unsqueeze(-1), 0), shard)
        student = ranks.whole(_logits(hidden, inputs.weight, inputs.bias), shard)
        if inputs.topk_logprobs is not None and inputs.topk_ids is not None:
            target = inputs.topk_logprobs, inputs.topk_ids, inputs.tail_logmass
            return topk_kl_div.forward(student, *target, *hard, options, settings.support)
        teacher = student.detach()  # whatever it is, nobody asks
        if inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
            teacher = _logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)
            teacher = ranks.whole(teacher, shard, teacher=True)
        return kl_div.forward(student, teacher, *hard, options)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).mT
    return logits if bias is None else logits + bias.to(dtype)
