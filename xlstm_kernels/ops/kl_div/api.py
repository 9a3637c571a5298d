"""`xk.kl_div`: checks, autograd, and the choice of backend."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from . import op, ranks, reference
from .autograd import LOSSES, Operators, check_inplace, runs_inplace
from .options import Options
from .rows import check_beside, check_labels_and_weight, check_logits

LOSSES["kl_div"] = Operators(op.forward, op.overwrite, op.scale)
LOSSES["kl_div by numbers"] = Operators(op.forward_by)
LOSSES["kl_div over ranks"] = ranks.operators(op.KL_DIV.module, op.scale)


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    inplace_grad: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence between the softmaxes of logits, mixed with hard-label cross-entropy.

    With p = softmax(teacher / T), q = softmax(student / T) and w the row's weight, a row's loss is
    ``w * (kl_weight * T**2 * D + ce_weight * CE)``, D one of

    ==================  ==============================================  =======================
    "forward"           KL(p|q)
    "reverse"           KL(q|p)
    "js"                beta KL(p|m) + (1 - beta) KL(q|m)               m = beta p + (1 - beta) q
    "skew"              KL(p|m)                                         m = beta p + (1 - beta) q
    "skew_reverse"      KL(q|m)                                         m = beta q + (1 - beta) p
    "tv"                sum |p - q| / 2, a tie counting as slope 0
    ==================  ==============================================  =======================

    and CE the cross-entropy of softmax(student), at temperature 1, with the row's label:
    ``lse - (1 - label_smoothing) * student[label] - label_smoothing * mean(student)
    + z_loss * lse**2`` with lse = logsumexp(student).

    Args:
        student_logits: (..., V). float64, float32, bfloat16 or float16. Views whose rows are
            contiguous, such as ``logits[:, :-1]``, are read in place.
        teacher_logits: (..., V'), the same leading shape, any of those dtypes. Where V' is not V,
            the columns beyond the narrower count as -inf. It must not require a gradient.
        labels: (...) integers in [0, V) or ignore_index; needed if ce_weight != 0. When given, a
            row labelled ignore_index contributes nothing, to no part of the loss. Another label is
            an error; on a device, where to look would be to wait, its row becomes NaN.
        divergence: one of the above.
        beta: how much of a mixture is p (js), or the distribution that it is compared with (skew,
            skew_reverse). Skewed divergences are the plain ones at 0; js is "forward" at 0 and
            "reverse" at 1, which the others are limits of (divided by beta, by 1 - beta).
        temperature: T, from 1e-6 to 1e6.
        ce_weight, kl_weight: weights of the two parts.
        label_smoothing: the part of the label's mass that all of the student's vocabulary shares,
            less what is masked.
        z_loss: weight of the squared logsumexp within the hard-label part.
        softcap, teacher_softcap: where given, logits z count as ``cap * tanh(z / cap)``, in both
            parts; a masked one stays masked. For logits that the model has not capped itself.
        row_weight: (...) weight of each row; it must not require a gradient.
        reduction: "mean", the sum over rows divided by the number of rows not ignored, whatever
            their weights; "sum"; "batchmean", the sum divided by the number of all rows; "none".
        inplace_grad: write the gradient over student_logits, which must be the result of another
            operation and not be used again: it needs no memory then, and backward runs only once.
            Without a gradient to compute, with backend "reference" and under torch.compile, which
            plans memory itself, it changes nothing.
        process_group: where given, the vocabulary is split over its ranks: student_logits and
            teacher_logits are this rank's columns, equally many of both but on the last rank, and
            follow those of the ranks before; labels count the whole vocabulary. They, row_weight,
            the options and the loss are the same on every rank, and each gets the gradient of its
            columns. The ranks call it together, and so they do a backward that computes the
            gradient again: a second one, and every one of float16. Beside a few numbers they
            exchange, however many the words, 96 bytes a row in two all-reduces, in a third one 16
            more for a mixture and "tv". They compare their calls first, for which a GPU is waited
            for. torch.compile cannot trace it; backend "reference" gathers all columns.
        backend: "auto", or one of "reference", "cpu", "cuda", "triton"; a named backend runs or
            raises. On a GPU "triton" reads nothing back: a label out of range makes its row NaN.

    Under torch.compile a number that changes from call to call, as a schedule's, is compiled twice
    and no more: once for its first value, which a CUDA graph can record, and once for any, which
    none can.

    Returns:
        The loss, (...) for reduction "none": float32, float64 for float64 logits; sums are in that
        dtype too. The gradient goes to student_logits alone. A masked logit, -inf, has probability
        0: the forward divergence is inf where the teacher has mass and the student is masked, the
        reverse one where the student has mass and the teacher is masked (its gradient is then NaN);
        the others are finite. A number as low as `torch.finfo(dtype).min` is a number: where one
        side alone has it, a divergence is as large, or inf. A row that is ignored or of weight 0
        gives loss 0 and gradient 0 whatever it holds. A NaN or inf among another row's logits, also
        the teacher's where kl_weight is 0, or for its weight, makes its loss and gradient NaN. One
        without that whose student or teacher is wholly masked gives 0. Without any row the loss is
        0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.
        RuntimeError: process_group without `torch.distributed`, or without this rank.

    Sources: Hinton, Vinyals & Dean, arXiv 1503.02531 (T**2); Agarwal et al., arXiv 2306.13649
    (js); Ko et al., arXiv 2402.03898 (skewed).

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> student = torch.randn(2, 7, 100, requires_grad=True)
        >>> loss = xk.kl_div(student, torch.randn(2, 7, 100), temperature=2.0)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 7, 100])
    """
    options = Options(
        *(divergence, beta, temperature, ce_weight, kl_weight, label_smoothing, z_loss),
        *(softcap, teacher_softcap, ignore_index, reduction),
    ).checked("kl_div")
    check_logits("kl_div", "student_logits", student_logits)
    check_logits("kl_div", "teacher_logits", teacher_logits)
    check_labels_and_weight("kl_div", labels, row_weight, ce_weight)
    check_beside("kl_div", "teacher_logits", teacher_logits, student_logits, per_row=False)
    check_beside("kl_div", "labels", labels, student_logits)
    check_beside("kl_div", "row_weight", row_weight, student_logits)
    over_ranks = process_group is not None
    chosen = op.KL_DIV.resolve(backend, student_logits, teacher_logits, over_ranks=over_ranks)
    widths = student_logits.shape[-1], teacher_logits.shape[-1]
    shard = ranks.find_shard("kl_div", process_group, student_logits, *widths, options)
    if chosen == "reference":
        student_logits = ranks.whole(student_logits, shard)
        teacher_logits = ranks.whole(teacher_logits, shard, teacher=True)
        return reference.forward(student_logits, teacher_logits, labels, row_weight, options)
    inplace_grad = runs_inplace(student_logits, inplace_grad)
    if inplace_grad:
        check_inplace("kl_div", student_logits, teacher_logits=teacher_logits)
    others = teacher_logits, labels, row_weight
    how = inplace_grad, chosen.value
    return ranks.row_loss("kl_div", student_logits, others, options, shard, *how)
