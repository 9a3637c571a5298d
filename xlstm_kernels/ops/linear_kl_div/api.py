"""`xk.linear_kl_div`, `xk.linear_topk_kl_div`, `xk.linear_cross_entropy`: checks, and the choice of
backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...cells import autocasts
from ..kl_div.options import Options
from . import op, reference
from .arguments import check_inputs, find_shard
from .autograd import linear_loss
from .inputs import Inputs, Settings


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """`xk.kl_div` of the logits ``hidden weight^T + bias`` of two heads, which are never all there.

    Logits live for a chunk of rows at a time, in float32 whatever the heads' dtype: rounded to 16
    bits they would cost the gradient its digits as student and teacher come close. Products are
    computed in the dtype of the hidden states, to which a weight of another dtype is rounded (under
    autocast the hidden states are cast as for a linear layer), and summed in float32, float64 for
    float64. Only what is needed runs: no product for a gradient that nobody wants and, on the CPU,
    none for a row that is ignored or of weight 0. A GPU is not waited for, to know which those are.
    Its products of float32, and of float16, are TF32 where
    `torch.backends.cuda.matmul.allow_tf32` says so.

    Args:
        student_hidden: (..., E), student_weight: (V, E), student_bias: (V,). float64, float32,
            bfloat16 or float16, each. The gradient goes to those that require one.
        teacher_hidden: (..., E'), the same leading shape, teacher_weight: (V', E'), teacher_bias:
            (V',), with widths of their own. They must not require a gradient.
        labels, divergence, beta, temperature, ce_weight, kl_weight, label_smoothing, z_loss,
            softcap, teacher_softcap, ignore_index, row_weight, reduction: as in `xk.kl_div`.
        chunk_rows: rows of a chunk, which decide memory and speed; results differ by rounding
            alone. None: as ops/linear_kl_div/plan.py says, 128 to 512, on a GPU 1024 to 4096.
        process_group: where given, the vocabulary is split over its ranks, as in `xk.kl_div`: the
            weights and biases are this rank's rows of them; all else is the same on every rank, and
            so is the gradient of student_hidden, which the ranks add up: no other sum over them
            is needed. In each chunk of rows they exchange what they do for `xk.kl_div`, and that
            gradient once, while the weight's is computed. The ranks go backward together where the
            gradients are computed there: a second time, for float16, and for reduction "none"
            where weight or bias requires one.
        backend: "auto", or one of "reference", "cpu", "cuda", "triton"; a named backend runs or
            raises. On a GPU nothing is read back: a label or a word out of range makes its row NaN.

    Returns:
        The loss, (...) for reduction "none": float32, float64 for float64 hidden states. The
        corner cases are those of `xk.kl_div`. Gradients of a reduced loss are computed along with
        it, so that backward has only to scale them; a second backward computes them again. For
        reduction "none" the gradients of weight and bias need a second pass in every backward.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.
        RuntimeError: process_group without `torch.distributed`, or without this rank.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> hidden = torch.randn(2, 7, 16, requires_grad=True)
        >>> head = torch.nn.Linear(16, 100)
        >>> teacher = torch.randn(2, 7, 32), torch.randn(100, 32)
        >>> xk.linear_kl_div(hidden, head.weight, *teacher, student_bias=head.bias).backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 7, 16]), torch.Size([100, 16]))
    """
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    options = Options(
        *(divergence, beta, temperature, ce_weight, kl_weight, label_smoothing, z_loss),
        *(softcap, teacher_softcap, ignore_index, reduction),
    )
    inputs = Inputs(*student, *teacher, None, None, None, labels, row_weight)
    how = chunk_rows, process_group, backend
    return _linear_loss("linear_kl_div", inputs, Settings(options), *how)


def linear_topk_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """`xk.topk_kl_div` of the logits ``hidden weight^T + bias``, which are never all there.

    Args:
        student_hidden: (..., E), student_weight: (V, E), student_bias: (V,). The gradient goes to
            those that require one.
        topk_logprobs, topk_ids, support, tail_logmass: as in `xk.topk_kl_div`.
        labels, divergence, beta, temperature, ce_weight, kl_weight, label_smoothing, z_loss,
            softcap, ignore_index, row_weight, reduction: as in `xk.kl_div`.
        chunk_rows, process_group, backend: as in `xk.linear_kl_div`.

    Returns:
        The loss, (...) for reduction "none", as `xk.linear_kl_div` does.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(100, 16)
        >>> logprobs, ids = torch.randn(7, 100).log_softmax(-1).topk(8)
        >>> xk.linear_topk_kl_div(hidden, weight, logprobs, ids).backward()
        >>> hidden.grad.shape
        torch.Size([7, 16])
    """
    options = Options(
        *(divergence, beta, temperature, ce_weight, kl_weight, label_smoothing, z_loss),
        *(softcap, None, ignore_index, reduction),
    )
    student = student_hidden, student_weight, student_bias
    words = topk_logprobs, topk_ids, tail_logmass
    inputs = Inputs(*student, None, None, None, *words, labels, row_weight)
    how = chunk_rows, process_group, backend
    return _linear_loss("linear_topk_kl_div", inputs, Settings(options, support), *how)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits ``hidden weight^T + bias``, which are never all there.

    It is `xk.linear_kl_div` without its teacher: the hard-label part alone.

    Args:
        hidden: (..., E), weight: (V, E), bias: (V,). The gradient goes to those that require one.
        labels: (...) integers in [0, V) or ignore_index.
        label_smoothing, z_loss, softcap, ignore_index, row_weight, reduction: as in `xk.kl_div`.
        chunk_rows, process_group, backend: as in `xk.linear_kl_div`.

    Returns:
        The loss, (...) for reduction "none", as `xk.linear_kl_div` does. No row left gives 0.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(100, 16)
        >>> xk.linear_cross_entropy(hidden, weight, torch.randint(100, (2, 7))).backward()
        >>> hidden.grad.shape
        torch.Size([2, 7, 16])
    """
    options = Options(
        ce_weight=1.0,
        kl_weight=0.0,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    inputs = Inputs(hidden, weight, bias, *(None,) * 6, labels, row_weight)
    how = chunk_rows, process_group, backend
    return _linear_loss("linear_cross_entropy", inputs, Settings(options), *how)


def _linear_loss(
    function: str,
    inputs: Inputs,
    settings: Settings,
    chunk_rows: int | None,
    process_group: dist.ProcessGroup | None,
    backend: str,
) -> Tensor:
    settings = settings._replace(
        options=settings.options.checked(function), chunk_rows=chunk_rows or 0
    )
    check_inputs(function, inputs, settings, chunk_rows)
    inputs = _cast(inputs)
    over_ranks = process_group is not None
    chosen = op.LINEAR_KL_DIV.resolve(backend, inputs, function=function, over_ranks=over_ranks)
    settings = settings._replace(shard=find_shard(function, inputs, settings, process_group))
    if chosen == "reference":
        return reference.forward(inputs, settings)
    return linear_loss(inputs, settings, chosen.value)


def _cast(inputs: Inputs) -> Inputs:
    """Hidden states as autocast has them for a linear layer."""
    if not autocasts(inputs.hidden.device):
        return inputs
    kind = inputs.hidden.device.type
    return inputs._replace(
        hidden=_autocast(inputs.hidden, kind),
        teacher_hidden=None
        if inputs.teacher_hidden is None
        else _autocast(inputs.teacher_hidden, kind),
    )


def _autocast(hidden: Tensor, device: str) -> Tensor:
    double = hidden.dtype == torch.float64
    return hidden if double else hidden.to(torch.get_autocast_dtype(device))
