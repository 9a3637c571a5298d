"""`xk.topk_kl_div`: checks, autograd, and the choice of backend."""

from __future__ import annotations

from types import MappingProxyType

import torch.distributed as dist
from torch import Tensor

from ..kl_div import op as kl_div_op
from ..kl_div import ranks
from ..kl_div.autograd import LOSSES, Operators, check_inplace, runs_inplace
from ..kl_div.options import Options
from ..kl_div.rows import check_beside, check_labels_and_weight, check_logits
from . import op, reference
from .arguments import check_support, check_target

LOSSES["topk_kl_div"] = Operators(op.forward, op.overwrite, kl_div_op.scale)
LOSSES["topk_kl_div by numbers"] = Operators(op.forward_by)
LOSSES["topk_kl_div over ranks"] = ranks.operators(op.TOPK_KL_DIV.module, kl_div_op.scale)

# Arguments of `topk_kl_div` as the xLSTM distillation has them (arXiv 2603.15590, Eq. 13), with the
# teacher's 256 likeliest words: xk.topk_kl_div(logits, logprobs, ids, labels, **xk.XLSTM_RECIPE).
XLSTM_RECIPE = MappingProxyType({"support": "both", "ce_weight": 0.9, "kl_weight": 0.1})


def topk_kl_div(
    student_logits: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    labels: Tensor | None = None,
    *,
    support: str = "tail",
    tail_logmass: Tensor | None = None,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    inplace_grad: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """`kl_div` from a teacher that is known by its likeliest words, or by samples.

    Args:
        student_logits: (..., V), as in `kl_div`.
        topk_logprobs: (..., K) the teacher's log-probabilities of those words, at temperature 1, in
            any order; it must not require a gradient.
        topk_ids: (..., K) integers: the words, from 0 to V - 1. -1 stands for none, where rows have
            fewer than K. Masses of a word that comes several times add up. On a GPU
            "triton" reads nothing back: a word out of range makes its row NaN.
        support: what the teacher says of the words outside.

            - "tail": they are one outcome more, with all the rest of the mass.
            - "renormalized": nothing, the mass inside is scaled to 1; the student's is not.
            - "both": nothing, and the student's softmax goes over the words inside alone. Where it
              is masked in all of them, its mass there counts as 0 and the gradient is 0.
            - "truncated": nothing, and nothing is scaled: sum p (log p - log q) over the words
              inside, which may be negative. Forward only.
            - "sampled": as "renormalized", for words drawn with replacement: exp(topk_logprobs) are
              the draws' weights, of any size, which temperature leaves alone. Zeros for plain
              draws, log(count) for counted ones, log(p / (n proposal)) for importance sampling.
        tail_logmass: (...) log of the teacher's mass outside, at temperature 1, for "tail" and
            "truncated". None: what the words inside leave of 1.
        temperature: T, of the student's softmax and of the teacher: p^(1/T), scaled to 1. Of the
            teacher's tail only the mass r is known; it counts as spread evenly over its n words:
            n (r / n)^(1/T).
        divergence, beta, ce_weight, kl_weight, label_smoothing, z_loss, softcap, ignore_index,
            row_weight, reduction, inplace_grad, backend, labels: as in `kl_div`, with its policy
            for masked logits, NaN, and rows that are ignored or without any mass.
        process_group: as in `kl_div`: student_logits are this rank's columns, and topk_logprobs,
            topk_ids, which count the whole vocabulary, and tail_logmass are the same on every rank.
            The ranks exchange 8 K bytes a row more, and never a third time.

    Returns:
        The loss, as `kl_div` does.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Sources: arXiv 2603.15590, Eq. 13 (`xk.XLSTM_RECIPE`); arXiv 2503.16870 (sampled).

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> student, teacher = torch.randn(7, 100, requires_grad=True), torch.randn(7, 100)
        >>> logprobs, ids = teacher.log_softmax(-1).topk(16)
        >>> xk.topk_kl_div(student, logprobs, ids).backward()
    """
    options = Options(
        *(divergence, beta, temperature, ce_weight, kl_weight, label_smoothing, z_loss),
        *(softcap, None, ignore_index, reduction),
    ).checked("topk_kl_div")
    check_support("topk_kl_div", support, tail_logmass, options.divergence)
    check_logits("topk_kl_div", "student_logits", student_logits)
    check_target("topk_kl_div", student_logits, topk_logprobs, topk_ids, tail_logmass)
    check_labels_and_weight("topk_kl_div", labels, row_weight, ce_weight)
    check_beside("topk_kl_div", "labels", labels, student_logits)
    check_beside("topk_kl_div", "row_weight", row_weight, student_logits)
    over_ranks = process_group is not None
    chosen = op.TOPK_KL_DIV.resolve(backend, student_logits, topk_logprobs, over_ranks=over_ranks)
    call = (*options, support)
    like = student_logits, student_logits.shape[-1], None, call, {"K": topk_ids.shape[-1]}
    shard = ranks.find_shard("topk_kl_div", process_group, *like)
    others = topk_logprobs, topk_ids, tail_logmass, labels, row_weight
    if chosen == "reference":
        return reference.forward(ranks.whole(student_logits, shard), *others, options, support)
    inplace_grad = runs_inplace(student_logits, inplace_grad)
    if inplace_grad:
        check_inplace("topk_kl_div", student_logits, topk_logprobs=topk_logprobs)
    how = inplace_grad, chosen.value
    return ranks.row_loss("topk_kl_div", student_logits, others, call, shard, *how)
