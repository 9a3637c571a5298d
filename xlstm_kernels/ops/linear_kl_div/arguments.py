"""What linear losses ask of their tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...arguments import check_is_positive, check_is_tensor, check_tensor
from ..kl_div import ranks
from ..kl_div.rows import check_beside, check_labels_and_weight
from ..topk_kl_div.arguments import check_support, check_target
from .inputs import DIFFERENTIABLE, Inputs, Settings

# By public function: the names of hidden states, weight and bias, and the teacher's.
NAMES = {
    "linear_kl_div": (
        ("student_hidden", "student_weight", "student_bias"),
        ("teacher_hidden", "teacher_weight", "teacher_bias"),
    ),
    "linear_topk_kl_div": (("student_hidden", "student_weight", "student_bias"), ()),
    "linear_cross_entropy": (("hidden", "weight", "bias"), ()),
}


def check_inputs(function: str, inputs: Inputs, settings: Settings, chunk_rows: int | None) -> None:
    """Shapes, dtypes and devices; nothing here reads a tensor's values."""
    ours, theirs = NAMES[function]
    first, whose = (ours[0], inputs.hidden), f"{ours[0]}'s"
    _check_head(function, ours, inputs.hidden, inputs.weight, inputs.bias, first)
    if theirs:
        teacher = inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias
        _check_head(function, theirs, *teacher, first)
        check_beside(function, theirs[0], inputs.teacher_hidden, inputs.hidden, False, whose)
        for name, tensor in zip(theirs[1:], teacher[1:], strict=True):
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{function}: {name} must not require a gradient, which goes to the student"
                    f" alone; pass {name}.detach()"
                )
    if function == "linear_topk_kl_div":
        words = inputs.topk_logprobs, inputs.topk_ids, inputs.tail_logmass
        check_support(function, settings.support, words[2], settings.options.divergence)
        check_target(function, inputs.hidden, *words, whose)  # type: ignore[arg-type]  # not None
    ce_weight = settings.options.ce_weight
    check_labels_and_weight(function, inputs.labels, inputs.row_weight, ce_weight)
    check_beside(function, "labels", inputs.labels, inputs.hidden, whose=whose)
    check_beside(function, "row_weight", inputs.row_weight, inputs.hidden, whose=whose)
    if chunk_rows is not None:
        check_is_positive(function, "chunk_rows", chunk_rows)


def find_shard(
    function: str, inputs: Inputs, settings: Settings, group: dist.ProcessGroup | None
) -> ranks.Shard | None:
    """None without a group."""
    if group is None:
        return None
    facts = {
        "bytes of an element of hidden states": inputs.hidden.dtype.itemsize,
        "bytes of an element of the weight": inputs.weight.dtype.itemsize,
        "K": 0 if inputs.topk_ids is None else inputs.topk_ids.shape[-1],
    }
    for name, part in zip(NAMES[function][0], DIFFERENTIABLE, strict=True):
        tensor = getattr(inputs, part)
        wanted = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        facts[f"{name}.requires_grad"] = int(wanted)
    teacher = inputs.teacher_weight
    widths = inputs.weight.shape[0], None if teacher is None else teacher.shape[0]
    call = *settings.options, settings.support, settings.chunk_rows
    return ranks.find_shard(function, group, inputs.hidden, *widths, call, facts)


def _check_head(
    function: str,
    names: tuple[str, ...],
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    first: tuple[str, Tensor],
) -> None:
    hidden_name, weight_name, bias_name = names
    for name, tensor in ((hidden_name, hidden), (weight_name, weight)):
        check_is_tensor(function, name, tensor)
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(
            f"{function}: {hidden_name} must be (..., E), E >= 1, got {tuple(hidden.shape)}"
        )
    E = hidden.shape[-1]
    check_tensor(function, hidden_name, hidden, "(..., E)", tuple(hidden.shape), first)
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(
            f"{function}: {weight_name} must be (V, E) = (V, {E}), V >= 1,"
            f" got {tuple(weight.shape)}"
        )
    V = weight.shape[0]
    check_tensor(function, weight_name, weight, "(V, E)", (V, E), first)
    if bias is not None:
        check_tensor(function, bias_name, bias, "(V,)", (V,), first)
