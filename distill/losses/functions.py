"""The losses of distillation by name, each (sum, count): divide by the count of all batches."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xlstm_kernels as xk
from distill.data.words import Drawn, Likeliest, Samples, TopK, Words
from distill.errors import DistillError
from distill.hybrid.attention import Rows, log_weights, wide
from distill.hybrid.stages import align_loss, topk_loss
from distill.losses.taps import IGNORED, Run

# What a loss may need, and `DistillModule` then sees to:
NEEDS = {
    "teacher": "a teacher that runs beside the student",
    "layers": "`ctx.layers()`: outputs of both, paired by the loss's argument `layers`",
    "attention": "`attention` of both runs, at `ctx.pairs`, by the argument `layers`",
    "widths": "`ctx.projections` from the student's width to the teacher's, where they differ",
    "embedding": "that those widths are the embeddings'",
    "mixers": "a student of `hybridize`",
    "words": "`ctx.words` of a cache, or a teacher",
    "logits": "all logits at once; without it, losses start from hidden states where they can",
    "hard": "`ctx.hard`: takes the cross-entropy along",
}
OF_A_TEACHER = {"teacher", "layers", "attention", "widths", "embedding"}
BEFORE_THE_HEAD = {"layers", "attention", "embedding", "mixers"}


@dataclass(frozen=True)
class LossContext:
    """What a loss is computed from. N is B * T."""

    student: Run
    teacher: Run  # there where a loss needs it
    words: Words | None  # (N, k), of a cache
    targets_BT: Tensor  # the word after each token, -100 where it does not count
    pairs: tuple[tuple[int, int], ...] = ()
    projections: nn.ModuleList | None = None  # of each pair
    positions: Tensor | None = None  # of the tokens in the text
    # Options of `xk.kl_div` that add the weighted cross-entropy to the weighted divergence.
    hard: Mapping[str, float] = field(default_factory=dict)

    @property
    def targets_N(self) -> Tensor:
        return self.targets_BT.flatten()

    @property
    def count(self) -> Tensor:
        """Words that count, on the device."""
        return (self.targets_BT != IGNORED).sum()

    def mask(self, tokens: str) -> Tensor:
        """(B, T): "labelled", the tokens whose next word counts, or "all"."""
        if tokens not in ("labelled", "all"):
            raise DistillError(f"losses: tokens must be 'labelled' or 'all', got {tokens!r}")
        labelled_BT = self.targets_BT != IGNORED
        return labelled_BT if tokens == "labelled" else labelled_BT.new_ones(labelled_BT.shape)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Outputs (B, T, E') of each pair of layers, the student's as wide as the teacher's."""
        student, teacher = self.student.layers_BTE, self.teacher.layers_BTE
        got = [student[s] for s, _ in self.pairs]
        return list(zip(self.widened(got), (teacher[t] for _, t in self.pairs), strict=True))

    def widened(self, states: list[Tensor]) -> list[Tensor]:
        if self.projections is None:
            return states
        return [to_teacher(x) for to_teacher, x in zip(self.projections, states, strict=True)]


Function = Callable[..., tuple[Tensor, Tensor]]


class Loss(NamedTuple):
    function: Function
    needs: frozenset[str]

    def options(self) -> dict[str, Any]:
        """Names and defaults of its keyword arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


LOSSES: dict[str, Loss] = {}


def register_loss(name: str, needs: Collection[str] = ()) -> Callable[[Function], Function]:
    """Make ``function(ctx, *, option=default, ...) -> (sum, count)`` known by `name`.

    Args:
        name: that recipes use.
        needs: names of `NEEDS`.

    Example:
        >>> import distill
        >>> @distill.register_loss("confidence", needs=("logits",))
        ... def confidence(ctx, *, power=1.0):
        ...     most_N = ctx.student.logits_NV.float().softmax(-1).amax(-1) ** power
        ...     return (most_N * (ctx.targets_N != -100)).sum(), ctx.count
    """
    if unknown := set(needs) - NEEDS.keys():
        raise DistillError(f"register_loss: needs must be of {', '.join(NEEDS)}, got {unknown}")
    if name in LOSSES or not name.isidentifier():
        raise DistillError(f"register_loss: name must be a new identifier, got {name!r}")

    def register(function: Function) -> Function:
        LOSSES[name] = Loss(function, frozenset(needs))
        return function

    return register


def nearest(kind: str, got: str, known: Collection[str]) -> str:
    """A message about a name that is none of `known`."""
    close = difflib.get_close_matches(got, known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{kind} must be one of {', '.join(sorted(known))}, got {got!r}{hint}"


@register_loss("ce")
def ce(
    ctx: LossContext, *, label_smoothing: float = 0.0, z_loss: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the text."""
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    options |= {"reduction": "sum", "backend": backend}
    student = ctx.student
    if student.is_linear:
        weight, bias = student.head
        loss = xk.linear_cross_entropy(
            student.hidden_NE, weight, ctx.targets_N, bias=bias, **options
        )
    else:
        logits_NV = student.logits_NV
        options |= {"ce_weight": 1.0, "kl_weight": 0.0}
        loss = xk.kl_div(logits_NV, logits_NV.detach(), ctx.targets_N, **options)
    return loss, ctx.count


@register_loss("kl", needs=("teacher", "hard"))
def kl(
    ctx: LossContext,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Divergence from the teacher, times temperature^2, as in `xk.kl_div`."""
    options: dict[str, Any] = {"temperature": temperature, "divergence": divergence, "beta": beta}
    options |= {"reduction": "sum", "backend": backend, **ctx.hard}
    student, teacher = ctx.student, ctx.teacher
    if student.is_linear and teacher.is_linear:
        head, theirs = student.head, teacher.head.narrowed(student.vocabulary)
        loss = xk.linear_kl_div(
            *(student.hidden_NE, head.weight_VE, teacher.hidden_NE, theirs.weight_VE),
            *(ctx.targets_N,),
            student_bias=head.bias_V,
            teacher_bias=theirs.bias_V,
            **options,
        )
    else:
        teacher_NV = teacher.logits_NV[:, : student.vocabulary]
        loss = xk.kl_div(student.logits_NV, teacher_NV, ctx.targets_N, **options)
    return loss, ctx.count


@register_loss("topk_kl", needs=("words", "hard"))
def topk_kl(
    ctx: LossContext,
    *,
    k: int = 256,
    samples: int | None = None,
    seed: int = 0,
    support: str | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Divergence from the teacher's `k` likeliest words, from so many `samples` of them drawn by
    `seed` and position (unbiased), or from what a cache has.

    Support and the others are those of `xk.topk_kl_div`; None is "tail", "sampled" of drawn words.
    """
    words = ctx.words
    if words is None:
        kind = Likeliest(k) if samples is None else Drawn(samples, seed)
        words = ctx.teacher.words(kind, ctx.positions, ctx.student.vocabulary)
    else:
        words = _within(words, ctx.student.vocabulary)
    options: dict[str, Any] = {"temperature": temperature, "divergence": divergence, "beta": beta}
    options |= {"support": support, "backend": backend, **ctx.hard}
    return topk_loss(ctx.student, words, ctx.targets_N, **options), ctx.count


def _within(words: Words, vocabulary: int) -> Words:
    """Words that the student lacks, a teacher's padding, count as -inf: the others share theirs."""
    lacking_NK = words.ids >= vocabulary
    if isinstance(words, Samples):  # their shares are scaled to 1 anyway
        return words._replace(ids=words.ids.masked_fill(lacking_NK, -1))
    lost_N = words.logprobs.masked_fill(~lacking_NK, float("-inf")).exp().sum(-1)
    scale_N = lost_N.clamp_max(1 - 1e-6).neg().log1p()
    return TopK(
        words.logprobs - scale_N[:, None],
        words.ids.masked_fill(lacking_NK, -1),
        words.tail_logmass - scale_N,
    )


@register_loss("logit_mse", needs=("teacher", "logits"))
def logit_mse(ctx: LossContext, *, center: bool = False) -> tuple[Tensor, Tensor]:
    """Squared difference of the logits, a mean over the words that both have.

    Args:
        center: take each row's mean away first, which no softmax sees.
    """
    V = min(ctx.student.vocabulary, ctx.teacher.vocabulary)
    rows = [wide(run.logits_NV[:, :V]) for run in (ctx.student, ctx.teacher)]
    got_NV, want_NV = (x - x.mean(-1, keepdim=True) if center else x for x in rows)
    return _masked_sum((got_NV - want_NV).square().mean(-1), ctx.targets_N != IGNORED), ctx.count


@register_loss("hidden_mse", needs=("layers", "widths"))
def hidden_mse(
    ctx: LossContext, *, layers: Any = "uniform", tokens: str = "labelled"
) -> tuple[Tensor, Tensor]:
    """Squared difference of layers' outputs, a mean over the width; counts tokens times pairs.

    Args:
        layers: of `taps.layer_pairs`.
        tokens: "labelled", those whose next word counts, or "all".
    """
    return _over_layers(ctx, tokens, lambda a, b: (wide(a) - wide(b)).square().mean(-1))


@register_loss("hidden_cosine", needs=("layers", "widths"))
def hidden_cosine(
    ctx: LossContext, *, layers: Any = "uniform", tokens: str = "labelled"
) -> tuple[Tensor, Tensor]:
    """1 - cosine between layers' outputs; else as `hidden_mse`."""
    return _over_layers(ctx, tokens, lambda a, b: 1 - F.cosine_similarity(wide(a), wide(b), dim=-1))


def _over_layers(
    ctx: LossContext, tokens: str, distance: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    mask_BT = ctx.mask(tokens)
    sums = [_masked_sum(distance(got, want), mask_BT) for got, want in ctx.layers()]
    return sum(sums[1:], sums[0]), mask_BT.sum() * len(sums)


@register_loss("embedding", needs=("widths", "embedding"))
def embedding(ctx: LossContext, *, tokens: str = "labelled") -> tuple[Tensor, Tensor]:
    """Squared difference of the tokens' embeddings, a mean over the width."""
    (got_BTE,) = ctx.widened([ctx.student.embedding_BTE])
    error_BTE = wide(got_BTE) - wide(ctx.teacher.embedding_BTE)
    mask_BT = ctx.mask(tokens)
    return _masked_sum(error_BTE.square().mean(-1), mask_BT), mask_BT.sum()


@register_loss("attention", needs=("attention",))
def attention(
    ctx: LossContext,
    *,
    kind: str = "kl",
    part: str = "mixer",
    rows: int = 48,
    layers: Any = "uniform",
    tokens: str = "labelled",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What queries attend to; counts queries times heads times pairs of layers.

    Args:
        kind: "kl", from the teacher's weights, or "mse", the squared differences of a row, added.
        part: of a hybrid student, whose weights: the whole "mixer"'s, or its "mlstm"'s.
        rows: how many queries of each sequence, `attention.Rows.sample`.
        layers, tokens: as in `hidden_mse`, of the queries. Where the heads are not equally many,
            their mean counts as one.
    """
    if kind not in ("kl", "mse"):
        raise DistillError(f"loss attention: kind must be 'kl' or 'mse', got {kind!r}")
    input_ids = ctx.student.input_ids
    sampled = Rows.sample(input_ids, rows, ctx.student.inputs.get("cu_seq_lens_q"))
    mask_B1R = sampled.of(ctx.mask(tokens))[:, None]
    students, teachers = ctx.student.attention, ctx.teacher.attention  # under autocast, if any
    sums, heads = [], 1
    with torch.autocast(input_ids.device.type, enabled=False):
        for s, t in ctx.pairs:
            got_BHRT = students[s].weights(sampled, part)
            with torch.no_grad():
                want_BHRT = teachers[t].weights(sampled)
            if got_BHRT.shape[1] != want_BHRT.shape[1]:
                got_BHRT, want_BHRT = (x.mean(1, keepdim=True) for x in (got_BHRT, want_BHRT))
            heads = got_BHRT.shape[1]
            if kind == "mse":
                error_BHR = (got_BHRT - want_BHRT).square().sum(-1)
                sums.append(_masked_sum(error_BHR, mask_B1R))
                continue
            logs = (log_weights(x, sampled) for x in (got_BHRT, want_BHRT))
            weight_BHR = mask_B1R.expand(got_BHRT.shape[:3]).to(got_BHRT.dtype)
            how: dict[str, Any] = {"row_weight": weight_BHR, "reduction": "sum", "backend": backend}
            sums.append(xk.kl_div(*logs, **how))
    return sum(sums[1:], sums[0]), mask_B1R.sum() * (heads * len(sums))


@register_loss("mixer_mse", needs=("mixers",))
def mixer_mse(
    ctx: LossContext, *, relative: bool = False, tokens: str = "labelled"
) -> tuple[Tensor, Tensor]:
    """Stage I: `stages.align_loss`; the teacher is the attention that the student still has."""
    student, mask_BT = ctx.student, ctx.mask(tokens)
    error, _ = align_loss(
        student.model, student.input_ids, relative=relative, mask=mask_BT, **student.inputs
    )
    return error, mask_BT.sum()


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0).sum()
