"""The softmax KL divergence in plain torch, any float dtype: the oracle of every other backend.

p = softmax(teacher / T), q = softmax(student / T), d = log p - log q
forward  KL(p|q) = sum  p d + q - p        reverse  KL(q|p) = sum -q d + p - q
row loss = weight (kl_weight T^2 KL + ce_weight CE)
Each summand of a divergence is >= 0 (Bregman form). A masked logit, -inf, has probability 0, and a
summand whose own probability is 0 takes no logarithm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import compute_dtype, no_autocast
from .options import Options


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
) -> Tensor:
    """The loss in the compute dtype: a scalar, or the leading shape for reduction "none"."""
    with no_autocast(student.device):
        return _loss(student, teacher, labels, row_weight, options)


def _loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
) -> Tensor:
    dtype = compute_dtype(student.dtype)
    student_V, teacher_V = _same_width(student.to(dtype), teacher.to(dtype))
    labels = None if labels is None else labels.to(torch.int64)
    valid = _valid(labels, options.ignore_index, student)
    weight = None if row_weight is None else row_weight.to(dtype)
    # Rows that contribute nothing become rows of zeros: finite whatever stood there.
    skip = ~valid | _masked(student_V) | _masked(teacher_V)
    if weight is not None:
        skip = skip | (weight == 0)
    student_V = student_V.masked_fill(skip.unsqueeze(-1), 0)
    teacher_V = teacher_V.masked_fill(skip.unsqueeze(-1), 0)
    loss = student_V.new_zeros(student.shape[:-1])
    if options.kl_weight != 0:
        T = options.temperature
        kl = _divergence(student_V / T, teacher_V / T, options.divergence)
        loss = loss + options.kl_weight * T**2 * kl
    if options.ce_weight != 0 and labels is not None:
        loss = loss + options.ce_weight * _cross_entropy(student_V, labels, skip)
    if weight is not None:
        loss = loss * weight
    return _reduce(loss.masked_fill(skip, 0), valid, options.reduction)


def _same_width(student_V: Tensor, teacher_V: Tensor) -> tuple[Tensor, Tensor]:
    """Logits beyond the narrower vocabulary are masked."""
    wider = teacher_V.shape[-1] - student_V.shape[-1]
    if wider > 0:
        student_V = F.pad(student_V, (0, wider), value=float("-inf"))
    elif wider < 0:
        teacher_V = F.pad(teacher_V, (0, -wider), value=float("-inf"))
    return student_V, teacher_V


def _valid(labels: Tensor | None, ignore_index: int, student: Tensor) -> Tensor:
    if labels is None:
        return torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    valid = labels != ignore_index
    V = student.shape[-1]
    outside = valid & ((labels < 0) | (labels >= V))
    readable = not (torch.compiler.is_compiling() or labels.is_meta)
    if readable and bool(outside.any()):
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"kl_div: labels must be in [0, {V}) or ignore_index = {ignore_index},"
            f" got {int(labels.flatten()[row])} at row {row}"
        )
    return valid


def _masked(logits_V: Tensor) -> Tensor:
    return (logits_V == float("-inf")).all(dim=-1)


def _divergence(student_V: Tensor, teacher_V: Tensor, divergence: str) -> Tensor:
    log_q, log_p = F.log_softmax(student_V, dim=-1), F.log_softmax(teacher_V, dim=-1)
    if divergence == "reverse":
        return _kl(log_q, log_p)
    return _kl(log_p, log_q)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) + b - a over the last axis."""
    a, b = log_a.exp(), log_b.exp()
    gap = (log_a.masked_fill(a == 0, 0)) - (log_b.masked_fill(a == 0, 0))
    return (a * gap + (b - a)).sum(dim=-1)


def _cross_entropy(student_V: Tensor, labels: Tensor, skip: Tensor) -> Tensor:
    index = labels.masked_fill(skip, 0).unsqueeze(-1)
    return -F.log_softmax(student_V, dim=-1).gather(-1, index).squeeze(-1)


def _reduce(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    rows = valid.sum() if reduction == "mean" else torch.tensor(loss.numel(), device=loss.device)
    return loss.sum() / rows.clamp_min(1)
