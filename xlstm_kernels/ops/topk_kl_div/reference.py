"""Divergences from a teacher of few words in plain torch: the oracle of every other backend.

Masses of a word that comes several times add up. Inside are the words that came, with
a = mass^(1/T); the tail's mass r is spread evenly over the n others, A = n (r / n)^(1/T):
tail          p = a / (sum a + A) inside, A / (sum a + A) for the words outside as one outcome
truncated     the same p inside, nothing outside; sum p (log p - log q), which is no divergence
renormalized  p = a / sum a inside, 0 outside      sampled  the same, with a = mass
both          p = a / sum a, and the student's softmax over the words inside alone
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import compute_dtype, no_autocast
from ..kl_div.options import Options
from ..kl_div.reference import (
    capped,
    cross_entropy,
    divergence,
    masked,
    nan_rows,
    reduce,
    skipped,
    unbounded,
)
from ..kl_div.rows import valid_rows
from .arguments import check_ids
from .support import WITH_TAIL

INF = float("inf")


def forward(
    student: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    tail_logmass: Tensor | None,
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
    support: str,
) -> Tensor:
    """The loss in the compute dtype: a scalar, or the leading shape for reduction "none"."""
    with no_autocast(student.device):
        dtype = compute_dtype(student.dtype)
        student_V = capped(student.to(dtype), options.softcap)
        V = student.shape[-1]
        valid = valid_rows("topk_kl_div", student, labels, V, options.ignore_index)
        weight = None if row_weight is None else row_weight.to(dtype)
        ids = topk_ids.to(torch.int64)
        check_ids("topk_kl_div", ids, V)
        logprobs = topk_logprobs.to(dtype).masked_fill(ids < 0, -INF)
        tail = None if tail_logmass is None else tail_logmass.to(dtype)
        wrong = unbounded(student_V) | unbounded(logprobs)
        if tail is not None:
            wrong = wrong | unbounded(tail.unsqueeze(-1))
        skip, wrong = skipped(valid, weight, masked(student_V), wrong)
        loss, unread = nan_rows(student_V, wrong), skip | wrong
        logprobs = logprobs.masked_fill(unread.unsqueeze(-1), -INF)
        tail = None if tail is None else tail.masked_fill(unread, -INF)
        T = 1.0 if support == "sampled" else options.temperature
        p_V, inside_V, p_tail = _teacher(logprobs, ids, tail, V, T, support)
        skip = skip | (~wrong & (p_V == 0).all(dim=-1) & (p_tail == 0))
        student_V = student_V.masked_fill((skip | wrong).unsqueeze(-1), 0)
        if options.kl_weight != 0:
            T = options.temperature
            D = _divergence(p_V, inside_V, p_tail, student_V / T, options, support)
            loss = loss + options.kl_weight * T**2 * D
        if options.ce_weight != 0 and labels is not None:
            hard = cross_entropy(student_V, labels, skip, options)
            loss = loss + options.ce_weight * hard
        return reduce(loss, weight, skip, valid, options.reduction)


def _teacher(
    logprobs: Tensor, ids: Tensor, tail_logmass: Tensor | None, V: int, T: float, support: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(p over the words, which words are inside, p of all others)."""
    zeros = logprobs.new_zeros(*ids.shape[:-1], V + 1)  # the last one takes the padding
    index = torch.where(ids < 0, V, ids)
    inside_V = (zeros.scatter(-1, index, 1.0) > 0)[..., :V]
    if support not in WITH_TAIL:  # weights of any size
        most = logprobs.amax(dim=-1, keepdim=True) if ids.shape[-1] else logprobs.new_zeros(1)
        logprobs = logprobs - most.masked_fill(most == -INF, 0)
    mass_V = zeros.scatter_add(-1, index, logprobs.exp())[..., :V]
    log_a, log_tail = mass_V.log() / T, torch.full_like(mass_V[..., 0], -INF)
    if support in WITH_TAIL:
        left = (1 - mass_V.sum(dim=-1)).clamp_min(0)
        log_r = left.log() if tail_logmass is None else tail_logmass
        words = V - inside_V.sum(dim=-1)
        log_words = words.clamp_min(1).to(log_r.dtype).log()
        log_tail = torch.where(words > 0, log_words + (log_r - log_words) / T, -INF)
    log_p = torch.cat([log_a, log_tail.unsqueeze(-1)], dim=-1)
    none = masked(log_p).unsqueeze(-1)
    p = log_p.masked_fill(none, 0).softmax(dim=-1).masked_fill(none, 0)
    return p[..., :-1], inside_V, p[..., -1]


def _divergence(
    p_V: Tensor, inside_V: Tensor, p_tail: Tensor, student_V: Tensor, options: Options, support: str
) -> Tensor:
    log_q = F.log_softmax(student_V, dim=-1)
    if support == "truncated":
        gap = p_V.masked_fill(p_V == 0, 1).log() - log_q.masked_fill(p_V == 0, 0)
        return (p_V * gap).sum(dim=-1)
    if support == "both":
        nan = (student_V.isnan() | p_V.isnan()).any(dim=-1, keepdim=True)  # fills its row
        student_V = student_V.masked_fill(~inside_V & ~nan, -INF)
        none = masked(student_V).unsqueeze(-1)
        log_q = F.log_softmax(student_V.masked_fill(none, 0), dim=-1).masked_fill(none, -INF)
        return divergence(p_V.log(), log_q, options.divergence, options.beta)
    log_inside = log_q.masked_fill(~inside_V, -INF)
    log_outside = log_q.masked_fill(inside_V, -INF)
    none = masked(log_outside)
    log_tail = torch.logsumexp(log_outside.masked_fill(none.unsqueeze(-1), 0), dim=-1)
    log_tail = log_tail.masked_fill(none, -INF)
    log_p = torch.cat([p_V, p_tail.unsqueeze(-1)], dim=-1).log()
    log_q = torch.cat([log_inside, log_tail.unsqueeze(-1)], dim=-1)
    return divergence(log_p, log_q, options.divergence, options.beta)
