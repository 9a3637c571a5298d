"""Divergences between softmaxes in plain torch, any float dtype: the oracle of every other backend.

p = softmax(teacher / T), q = softmax(student / T); what m is, api.py says
forward  KL(p|q)      reverse  KL(q|p)      js            beta KL(p|m) + (1 - beta) KL(q|m)
skew     KL(p|m)      tv  sum |p - q| / 2   skew_reverse  KL(q|m)
row loss = weight (kl_weight T^2 D + ce_weight CE)
KL(a|b) is summed as a (log a - log b) + b - a, where each summand is >= 0 (Bregman form). A masked
logit, -inf, has probability 0, and a summand whose own probability is 0 takes no logarithm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import compute_dtype, no_autocast
from .options import Options
from .rows import valid_rows


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
) -> Tensor:
    """The loss in the compute dtype: a scalar, or the leading shape for reduction "none"."""
    with no_autocast(student.device):
        dtype = compute_dtype(student.dtype)
        student_V = capped(student.to(dtype), options.softcap)
        teacher_V = capped(teacher.to(dtype), options.teacher_softcap)
        valid = valid_rows("kl_div", student, labels, student.shape[-1], options.ignore_index)
        student_V, teacher_V = _same_width(student_V, teacher_V)
        weight = None if row_weight is None else row_weight.to(dtype)
        wrong = unbounded(student_V) | unbounded(teacher_V)
        skip, wrong = skipped(valid, weight, masked(student_V) | masked(teacher_V), wrong)
        loss = nan_rows(student_V, wrong)
        # Rows that contribute nothing, or NaN, become rows of zeros, whatever stood there.
        student_V = student_V.masked_fill((skip | wrong).unsqueeze(-1), 0)
        teacher_V = teacher_V.masked_fill((skip | wrong).unsqueeze(-1), 0)
        if options.kl_weight != 0:
            T = options.temperature
            log_q, log_p = F.log_softmax(student_V / T, -1), F.log_softmax(teacher_V / T, -1)
            D = divergence(log_p, log_q, options.divergence, options.beta)
            loss = loss + options.kl_weight * T**2 * D
        if options.ce_weight != 0 and labels is not None:
            hard = cross_entropy(student_V[..., : student.shape[-1]], labels, skip, options)
            loss = loss + options.ce_weight * hard
        return reduce(loss, weight, skip, valid, options.reduction)


def capped(logits_V: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return logits_V
    kept = (logits_V == float("-inf")) | logits_V.isnan()
    # tanh sees neither: a gradient of 0 times NaN's slope would be NaN.
    return torch.where(kept, logits_V, cap * torch.tanh(logits_V.masked_fill(kept, 0) / cap))


def _same_width(student_V: Tensor, teacher_V: Tensor) -> tuple[Tensor, Tensor]:
    """Logits beyond the narrower vocabulary are masked."""
    wider = teacher_V.shape[-1] - student_V.shape[-1]
    if wider > 0:
        student_V = F.pad(student_V, (0, wider), value=float("-inf"))
    elif wider < 0:
        teacher_V = F.pad(teacher_V, (0, -wider), value=float("-inf"))
    return student_V, teacher_V


def masked(logits_V: Tensor) -> Tensor:
    return (logits_V == float("-inf")).all(dim=-1)


def skipped(
    valid: Tensor, weight: Tensor | None, none: Tensor, wrong: Tensor
) -> tuple[Tensor, Tensor]:
    """Which rows contribute nothing, and which NaN. `none`: those without a student or a teacher.
    `wrong`: those with a NaN, which shows even there, but not where a row is ignored or weighs 0.
    """
    skip = ~valid
    if weight is not None:
        skip, wrong = skip | (weight == 0), wrong | ~weight.isfinite()
    wrong = wrong & ~skip
    return skip | (none & ~wrong), wrong


def nan_rows(student_V: Tensor, wrong: Tensor) -> Tensor:
    """A loss of NaN, with a gradient of NaN, for these rows, and 0 for the others."""
    factor = torch.where(wrong, float("nan"), 0.0).to(student_V.dtype)
    return (student_V.masked_fill(~wrong.unsqueeze(-1), 0) * factor.unsqueeze(-1)).sum(dim=-1)


def unbounded(logits_V: Tensor) -> Tensor:
    """Rows with a NaN or with inf, whose softmax is NaN."""
    return ~(logits_V < float("inf")).all(dim=-1)


def divergence(log_p: Tensor, log_q: Tensor, name: str, beta: float) -> Tensor:
    """Between distributions over the last axis."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward":
        return _kl(log_p, log_q, q)
    if name == "reverse":
        return _kl(log_q, log_p, p)
    if name == "tv":
        d = p - q
        sign = d.sign().where(~d.isnan(), d)  # NaN has the sign 0
        return (d * sign.detach()).sum(dim=-1) / 2
    m = beta * q + (1 - beta) * p if name == "skew_reverse" else beta * p + (1 - beta) * q
    log_m = m.masked_fill(m == 0, 1).log()
    if name == "skew":
        return _kl(log_p, log_m, m)
    if name == "skew_reverse":
        return _kl(log_q, log_m, m)
    return beta * _kl(log_p, log_m, m) + (1 - beta) * _kl(log_q, log_m, m)


def _kl(log_a: Tensor, log_b: Tensor, b: Tensor) -> Tensor:
    a = log_a.exp()
    gap = log_a.masked_fill(a == 0, 0) - log_b.masked_fill(a == 0, 0)
    return (a * gap + (b - a)).sum(dim=-1)


def cross_entropy(logits_V: Tensor, labels: Tensor, skip: Tensor, options: Options) -> Tensor:
    index = labels.to(torch.int64).masked_fill(skip, 0).unsqueeze(-1)
    if options.label_smoothing == 0 and options.z_loss == 0:
        return -F.log_softmax(logits_V, dim=-1).gather(-1, index).squeeze(-1)
    lse = torch.logsumexp(logits_V, dim=-1)
    loss = lse - (1 - options.label_smoothing) * logits_V.gather(-1, index).squeeze(-1)
    if options.label_smoothing != 0:
        inside = logits_V != float("-inf")
        mean = logits_V.where(inside, 0).sum(dim=-1) / inside.sum(dim=-1)
        loss = loss - options.label_smoothing * mean
    return loss + options.z_loss * lse**2


def reduce(
    loss: Tensor, weight: Tensor | None, skip: Tensor, valid: Tensor, reduction: str
) -> Tensor:
    if weight is not None:
        loss = loss * weight
    loss = loss.masked_fill(skip, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    rows = valid.sum() if reduction == "mean" else torch.tensor(loss.numel(), device=loss.device)
    return loss.sum() / rows.clamp_min(1)
