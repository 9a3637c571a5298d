"""The first two stages that turn a teacher into a hybrid student, as losses (sum, count).

Divide the sum by the count over all micro-batches and ranks. Each runs the student once, within
whatever module wraps it.

Source: arXiv 2603.15590, sections 3.2 and 3.3, equations 12 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import xlstm_kernels as xk
from distill.data.words import Likeliest, Samples, TopK, Words
from distill.errors import DistillError
from distill.hybrid.mixer import HybridMixer
from distill.losses.taps import IGNORED, Run, by_token, next_words


def align_loss(
    student: Any,
    input_ids: Tensor,
    *,
    relative: bool = False,
    mask: Tensor | None = None,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
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
        mask: (B, T), the tokens that count; None is all.
        **inputs: to the student, as `cu_seq_lens_q`.

    Returns:
        The sum, and the number of tokens that count.
    """
    sums: list[Tensor] = []
    mask_BT = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    count = mask_BT.sum()

    def squares(x_BTHD: Tensor) -> Tensor:
        # In float32: a sum of squares of 16 bits loses most of them.
        return x_BTHD.float().square().sum((2, 3)).masked_fill(~mask_BT, 0).sum()

    def compare(mixer: HybridMixer, tensors: list[Tensor], want_BTHD: Tensor, **how: Any) -> None:
        with torch.enable_grad():
            got_BTHD = mixer(*(x.detach() for x in tensors), **how)
            error = squares(got_BTHD - want_BTHD)
            # Where no token counts, both are 0.
            sums.append(error * count / squares(want_BTHD).clamp_min(1e-30) if relative else error)

    _observe("align_loss", student, input_ids, compare, **inputs)
    return torch.stack(sums).sum(), count


def calibrate_gates(student: Any, input_ids: Tensor) -> None:
    """Set gate biases from the teacher's attention, instead of `HybridOptions.gate_init`.

    A forget gate keeps a half over the mean distance to which its teacher looks back, sinks aside,
    with its head, or all heads that share its state. An output gate opens by the share of the
    attention that neither window nor sinks see, and by 1 % at least. A window that the teacher has
    itself is not looked at. The paper has no such step.

    Args:
        student: as in `align_loss`.
        input_ids: (B, T), T larger than window and sinks; memory grows with B T^2.
    """

    def measure(
        mixer: HybridMixer, tensors: list[Tensor], _: Tensor, scale: float, **how: Any
    ) -> None:
        window, sinks = mixer.options.window, mixer.options.sinks
        q_BTHD, k_BTGD = tensors[1].float(), tensors[2].float()
        T, H = q_BTHD.shape[1:3]
        if window + sinks >= T:
            raise DistillError(
                "calibrate_gates: input_ids must be longer than window and sinks,"
                f" {window} + {sinks}, got T = {T}"
            )
        k_BTHD = k_BTGD.repeat_interleave(H // k_BTGD.shape[2], dim=2)
        t, j = torch.arange(T, device=q_BTHD.device)[:, None], torch.arange(T, device=q_BTHD.device)
        scores_BHTT = torch.einsum("bthd,bjhd->bhtj", q_BTHD, k_BTHD) * scale
        weights_BHTT = scores_BHTT.masked_fill(j > t, float("-inf")).softmax(-1)
        unseen = (j <= t - window) & (j >= sinks)
        share_H = (weights_BHTT * unseen)[:, :, window + sinks :].sum(-1).mean((0, 2))
        no_sinks = weights_BHTT * (j >= sinks)
        far_S, all_S = (
            x_BHTT.sum((0, 2, 3)).unflatten(0, (mixer.states, -1)).sum(1)
            for x_BHTT in (no_sinks * (t - j), no_sinks)
        )
        distance_S = far_S / all_S
        # f^distance = 1/2, and f = sigmoid(bias).
        forget_S = -torch.expm1(math.log(2) / distance_S.clamp_min(1)).log()
        mixer.gates.bias[mixer.states :] = forget_S
        mixer.output_bias.copy_(share_H.clamp(0.01, 0.99).logit())

    _observe("calibrate_gates", student, input_ids, measure)


@torch.no_grad()
def _observe(
    function: str, student: Any, input_ids: Tensor, observer: Callable[..., None], **inputs: Any
) -> None:
    """Run the teacher that is in the student, and the observer on each of its mixers."""
    if not any(isinstance(module, HybridMixer) for module in student.modules()):
        raise DistillError(
            f"{function}: student must have mixers, as `hybridize` makes,"
            f" got {type(student).__name__}"
        )
    training = student.training
    student.eval()  # no dropout in what is to be learned
    try:
        student.base_model(input_ids, use_cache=False, mixer_observer=observer, **inputs)
    finally:
        student.train(training)
        # Weights that autocast has cast here have no gradient: some versions of torch would take
        # them for the next pass, which wants one.
        torch.clear_autocast_cache()


def topk_targets(teacher: Any, input_ids: Tensor, k: int = 256, **inputs: Any) -> TopK:
    """The teacher's likeliest words after each token of input_ids (B, T); all parts (B, T, ...)."""
    words = Run(teacher, input_ids, inputs).words(Likeliest(k))
    return TopK(*(x.unflatten(0, input_ids.shape) for x in words))


def sparse_loss(
    student: Any,
    input_ids: Tensor,
    words: Words,
    labels: Tensor | None = None,
    *,
    ce_weight: float = 0.9,
    kl_weight: float = 0.1,
    support: str | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """Stage II: ce_weight * cross-entropy + kl_weight * KL(teacher's likeliest words | student).

    The logits are never all there (`xk.linear_topk_kl_div`).

    Args:
        student, input_ids, **inputs: as in `align_loss`.
        words: of `topk_targets`, or of a teacher cache; (B, T, ...), or of all tokens in order.
            Those at t are of the word at t + 1.
        labels: (B, T), -100 where a word does not count; None is `input_ids`. Not shifted.
        ce_weight, kl_weight: the paper's gamma and beta.
        support, temperature, backend: as in `xk.topk_kl_div`. The paper leaves the support open;
            None is "tail", and "sampled" of words that are drawn.

    Returns:
        The sum, and the number of words that count.
    """
    labels = input_ids if labels is None else labels
    targets_N = next_words(labels, inputs.get("cu_seq_lens_q")).flatten()
    loss = topk_loss(
        Run(student, input_ids, inputs, grad=True),
        by_token(words),
        targets_N,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        support=support,
        temperature=temperature,
        backend=backend,
    )
    return loss, (targets_N != IGNORED).sum()


def topk_loss(student: Run, words: Words, targets_N: Tensor, **options: Any) -> Tensor:
    """The sum over rows of `xk.topk_kl_div` with its options; from hidden states where it can."""
    options["reduction"] = "sum"
    options["support"] = _support(words, options)
    if isinstance(words, TopK) and options["support"] in ("tail", "truncated"):
        options["tail_logmass"] = words.tail_logmass
    targets = words.logprobs, words.ids, targets_N
    if student.is_linear:
        weight_VE, options["student_bias"] = student.head
        return xk.linear_topk_kl_div(student.hidden_NE, weight_VE, *targets, **options)
    return xk.topk_kl_div(student.logits_NV, *targets, **options)


def _support(words: Words, options: Mapping[str, Any]) -> str:
    """What the words call for where nothing is asked for; raises for what they cannot be."""
    asked = options["support"]
    if not isinstance(words, Samples):
        if asked == "sampled":
            raise DistillError(
                "topk_kl: support must be None, or one of the likeliest words, which these are, got"
                " 'sampled'; `samples` of the loss, or of `distill cache`, draws them"
            )
        return asked or "tail"
    for name, value, plain in (
        ("support", asked or "sampled", "sampled"),
        ("temperature", options.get("temperature", 1.0), 1.0),
        ("divergence", options.get("divergence", "forward"), "forward"),
    ):
        if value != plain:
            raise DistillError(
                f"topk_kl: {name} must be {plain!r} of words that are drawn, whose loss would be"
                f" biased otherwise, got {value!r}"
            )
    return "sampled"
