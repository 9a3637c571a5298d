"""The first two stages that turn a teacher into a hybrid student, as losses (sum, count).

Divide the sum by the count over all micro-batches and ranks. Each runs the student once, within
whatever module wraps it.

Source: arXiv 2603.15590, sections 3.2 and 3.3, equations 12 and 13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import xlstm_kernels as xk
from distill.errors import DistillError


def align_loss(
    student: Any, input_ids: Tensor, *, relative: bool = False, **inputs: Any
) -> tuple[Tensor, int]:
    """Stage I: sum over layers and tokens of |attention - mixer|^2, before the output projection.

    One forward pass of the student does: each layer computes both from the same queries, keys and
    values, and the teacher's attention goes on to the next. So layers learn apart from one another,
    on the teacher's own activations, as long as the weights that it shares or copied are still the
    teacher's. Gradients reach the mixers' parameters (`new_parameters`) and nothing else.

    Args:
        student: from `hybridize` or `load_student`.
        input_ids: (B, T).
        relative: divide each layer's sum by its attention's own, times the count: later layers,
            whose values are larger, then count no more than the first.
        **inputs: to the student, as `cu_seq_lens_q`.

    Returns:
        The sum, and the number of tokens.
    """
    errors: list[tuple[Tensor, Tensor]] = []
    training = student.training
    student.eval()  # no dropout in what is to be learned
    try:
        with torch.no_grad():
            student.base_model(input_ids, use_cache=False, mixer_errors=errors, **inputs)
    finally:
        student.train(training)
    if not errors:
        raise DistillError(
            f"align_loss: student must have mixers, as `hybridize` makes, got"
            f" {type(student).__name__}"
        )
    count = input_ids.numel()
    parts = [error * count / norm if relative else error for error, norm in errors]
    return torch.stack(parts).sum(), count


@torch.no_grad()
def topk_targets(
    teacher: Any, input_ids: Tensor, k: int = 256, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids (B, T, k) of the teacher's likeliest next words."""
    logits_BTV = teacher(input_ids, use_cache=False, **inputs).logits
    return logits_BTV.float().log_softmax(dim=-1).topk(min(k, logits_BTV.shape[-1]), dim=-1)


def sparse_loss(
    student: Any,
    input_ids: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    labels: Tensor | None = None,
    *,
    ce_weight: float = 0.9,
    kl_weight: float = 0.1,
    support: str = "tail",
    temperature: float = 1.0,
    backend: str = "auto",
    **inputs: Any,
) -> tuple[Tensor, int]:
    """Stage II: ce_weight * cross-entropy + kl_weight * KL(teacher's likeliest words | student).

    The logits are never all there (`xk.linear_topk_kl_div`).

    Args:
        student, input_ids, **inputs: as in `align_loss`.
        topk_logprobs, topk_ids: (B, T, k) of `topk_targets`: those at t are of the word at t + 1.
        labels: (B, T), -100 where a word does not count; None is `input_ids`. Not shifted.
        ce_weight, kl_weight: the paper's gamma and beta.
        support, temperature, backend: as in `xk.topk_kl_div`. The paper leaves the support open.

    Returns:
        The sum, and the number of words that count.
    """
    hidden_BTE = student.base_model(input_ids, use_cache=False, **inputs)[0]
    head = student.get_output_embeddings()
    targets_BT = (input_ids if labels is None else labels)[:, 1:]
    loss = xk.linear_topk_kl_div(
        hidden_BTE[:, :-1],
        head.weight,
        topk_logprobs[:, :-1],
        topk_ids[:, :-1],
        targets_BT,
        student_bias=head.bias,
        support=support,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        reduction="sum",
        backend=backend,
    )
    return loss, int((targets_BT != -100).sum())
