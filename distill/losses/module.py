"""All losses of a training step in one module, so that DDP and FSDP see each use of a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

import xlstm_kernels as xk
from distill.data.words import Words, each
from distill.errors import DistillError
from distill.hybrid.convert import new_parameters, packed_positions
from distill.losses.functions import (
    BEFORE_THE_HEAD,
    LOSSES,
    OF_A_TEACHER,
    LossContext,
    nearest,
    register_loss,
)
from distill.losses.taps import (
    Run,
    Wanted,
    attention_of,
    by_token,
    decoder_layers,
    gathered,
    layer_pairs,
    next_words,
    require_documents,
)

__all__ = ["LOSSES", "DistillModule", "LossContext", "LossSpec", "Schedule", "register_loss"]

KINDS = ("constant", "linear", "cosine", "steps")


@dataclass(frozen=True)
class Schedule:
    """A number that is a function of the step alone, hence the same on all ranks.

    kind: "constant": `start`; "linear", "cosine": `start` until step `begin`, then towards `end`,
        which is there at step `until`; None is the last of the stage; "steps": `start`, and from
        each step of `points` on the value beside it.
    """

    kind: str = "constant"
    start: float = 1.0
    end: float = 0.0
    begin: int = 0
    until: int | None = None
    points: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DistillError(nearest("schedule: kind", self.kind, KINDS))
        try:
            points = tuple((int(at), float(value)) for at, value in self.points)
        except (TypeError, ValueError):
            points = None
        if points is None or list(points) != sorted(points):
            raise DistillError(
                "schedule: points must be pairs [step, value] in the order of steps, got"
                f" {self.points!r}"
            )
        object.__setattr__(self, "points", points)

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """From a number, from a mapping of a recipe, or as it is."""
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            known = [f.name for f in fields(cls)]
            for name in value:
                if name not in known:
                    raise DistillError(nearest("schedule: options", name, known))
            return cls(**value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DistillError(f"schedule: must be a number or a schedule, got {value!r}")
        return cls(start=float(value))

    def at(self, step: int, steps: int) -> float:
        """At `step`, from 0, of a stage of `steps`."""
        if self.kind == "constant":
            return self.start
        if self.kind == "steps":
            return next((x for at, x in reversed(self.points) if step >= at), self.start)
        until = steps - 1 if self.until is None else self.until
        done = min(max((step - self.begin) / max(until - self.begin, 1), 0.0), 1.0)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class LossSpec:
    """A loss by name, its weight, and its own arguments."""

    name: str
    weight: float | Schedule = 1.0
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise DistillError(nearest("loss: name", self.name, LOSSES))
        known = LOSSES[self.name].options()
        for name in self.args:
            if name not in known:
                raise DistillError(nearest(f"loss {self.name}: args", name, known))
        object.__setattr__(self, "weight", Schedule.of(self.weight))

    def weight_at(self, step: int, steps: int) -> float:
        return Schedule.of(self.weight).at(step, steps)

    @property
    def options(self) -> dict[str, Any]:
        return LOSSES[self.name].options() | self.args

    @property
    def needs(self) -> frozenset[str]:
        return LOSSES[self.name].needs

    @property
    def needs_teacher(self) -> bool:
        return bool(self.needs & OF_A_TEACHER)


class DistillModule(nn.Module):
    """A student and all losses of a stage; call it through whatever wraps it, DDP or FSDP.

    The teacher is no submodule: no optimizer, no wrapper and no checkpoint sees its parameters. It
    runs without gradients, once a batch, without its head where no loss needs it, and not at all
    where none needs the teacher.

    Args:
        student: a causal language model of transformers, or of `hybridize`.
        teacher: one with the same tokenizer, or None. It must not share what the student trains.
        specs: the losses; each name once. Where the cross-entropy and a divergence are asked for,
            both are computed in one pass from weights that `forward` is told.

    Attributes:
        projections: from the student's width to the teacher's, by loss, where losses compare
            states of other widths. They are trained with the student and not part of it.
    """

    def __init__(self, student: Any, teacher: Any | None, specs: Sequence[LossSpec]):
        super().__init__()
        self.student = student
        self.specs = tuple(specs)
        names = [spec.name for spec in self.specs]
        if not names or len(set(names)) < len(names):
            raise DistillError(f"losses: each must be named once, and one at least, got {names}")
        self._teacher = (teacher,)  # in a tuple, torch does not see it
        if teacher is not None:
            teacher.eval()
        self._pairs: dict[str, tuple[tuple[int, int], ...]] = {}
        self.projections = nn.ModuleDict()
        for spec in self.specs:
            if spec.needs_teacher and teacher is None:
                raise DistillError(f"loss {spec.name}: needs a teacher that runs, got none")
            if "mixers" in spec.needs and not new_parameters(student):
                raise DistillError(
                    f"loss {spec.name}: needs a student of `hybridize`, got"
                    f" {type(student).__name__}"
                )
            if spec.needs & {"layers", "attention"}:
                self._pairs[spec.name] = self._layer_pairs(spec)
            if "widths" in spec.needs:
                self._add_projections(spec)
        logits = any("logits" in spec.needs for spec in self.specs)
        self._wanted = tuple(
            Wanted(logits, *(self._tapped(need, side) for need in ("layers", "attention")))
            for side in (0, 1)
        )

    @property
    def teacher(self) -> Any | None:
        return self._teacher[0]

    @property
    def leaves_unused(self) -> bool:
        """Whether no loss reaches the head: DDP has to `find_unused_parameters` then."""
        return all(spec.needs & BEFORE_THE_HEAD for spec in self.specs)

    @property
    def begins_within_layers(self) -> bool:
        """Whether FSDP2 must not `reshard_after_forward`: it gathers a layer's weights again when
        backward comes to what the layer returned, and a loss of what is within may come first."""
        return self.leaves_unused and any(s.needs & {"attention", "mixers"} for s in self.specs)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        words: Words | None = None,
        positions: Tensor | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The sum and the count of each loss, both on the device, before any weight.

        Args:
            input_ids: (B, T).
            labels: (B, T), not shifted, -100 where a word does not count.
            cu_seqlens: (S + 1,) int32, where documents begin in the one row of packed ones. The
                first word of a document counts for none before it.
            words: of a teacher cache, of all tokens in order, (N, k) or (B, T, k).
            positions: of all tokens in the text, by which words of a teacher that runs are drawn.
            weights: of the losses, by name. Where they are given, cross-entropy and a divergence
                take one pass: the values are those of each loss, and so is the gradient of the sum
                of losses times these weights, divided by one count for both; but no gradient
                belongs to either alone. Without weights each loss has its own.
        """
        inputs: dict[str, Any] = {}
        if cu_seqlens is not None:
            inputs = packed_inputs(cu_seqlens, input_ids)
            for model in (self.student, self.teacher):
                if model is not None:
                    require_documents(model)
        student = Run(self.student, input_ids, inputs, self._wanted[0], grad=True)
        words = None if words is None else _of_tokens(words, input_ids)
        asks_for_words = words is None and any("words" in spec.needs for spec in self.specs)
        if asks_for_words and self.teacher is None:
            raise DistillError("losses: words must be given where there is no teacher")
        teacher: Any = None
        if asks_for_words or any(spec.needs_teacher for spec in self.specs):
            teacher = self._teacher_run(input_ids, inputs)
        targets_BT = next_words(labels, cu_seqlens)
        context = LossContext(student, teacher, words, targets_BT, positions=positions)
        with nullcontext() if teacher is None else gathered(self.teacher):
            found = self._in_one_pass(context, weights or {})
            for spec in self.specs:
                if spec.name not in found:
                    found[spec.name] = self._compute(spec, context)
        return {spec.name: found[spec.name] for spec in self.specs}

    def _compute(self, spec: LossSpec, context: LossContext, **more: Any) -> tuple[Tensor, Tensor]:
        own: dict[str, Any] = {"pairs": self._pairs.get(spec.name, ())}
        if spec.name in self.projections:
            own["projections"] = self.projections[spec.name]
        try:
            return LOSSES[spec.name].function(replace(context, **own, **more), **spec.args)
        except (TypeError, ValueError, NotImplementedError) as error:
            # An option that an operation refuses, with the operation's name, is a recipe's mistake.
            if str(error).partition(":")[0] not in dir(xk):
                raise
            raise DistillError(f"loss {spec.name}: {error}") from error

    def _in_one_pass(
        self, context: LossContext, weights: Mapping[str, float]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross-entropy and the first divergence, where there are both on the same backend.

        The product with the head and those of its gradient then run once. The value of the
        cross-entropy takes one product more, without a gradient; the divergence is the rest.
        """
        hard = next((spec for spec in self.specs if spec.name == "ce"), None)
        soft = next((spec for spec in self.specs if "hard" in spec.needs), None)
        if hard is None or soft is None or hard.options["backend"] != soft.options["backend"]:
            return {}
        ce_weight, kl_weight = (float(weights.get(spec.name, 0.0)) for spec in (hard, soft))
        if not (ce_weight and kl_weight and torch.is_grad_enabled()):
            return {}
        options = {name: x for name, x in hard.options.items() if name != "backend"}
        options |= {"ce_weight": ce_weight, "kl_weight": kl_weight}
        both, count = self._compute(soft, context, hard=options)
        with torch.no_grad():
            ce, _ = self._compute(hard, context)
        return {"ce": (ce, count), soft.name: ((both - ce_weight * ce) / kl_weight, count)}

    def _teacher_run(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> Run:
        teacher: Any = self.teacher
        theirs = {id(parameter) for parameter in teacher.parameters()}
        if any(p.requires_grad and id(p) in theirs for p in self.student.parameters()):
            raise DistillError(
                "losses: the student must not train weights that are the teacher's as well;"
                " pass copy_weights=True to `hybridize`, or freeze them"
            )
        if teacher.device != input_ids.device:
            teacher.to(input_ids.device)
        return Run(teacher, input_ids, inputs, self._wanted[1])

    def _layer_pairs(self, spec: LossSpec) -> tuple[tuple[int, int], ...]:
        models = (self.student, self.teacher)
        own, theirs = (decoder_layers(model) for model in models)
        if "attention" in spec.needs:
            for model, of_model in zip(models, (own, theirs), strict=True):
                attention_of(model, of_model[0])  # or an error
        copied = getattr(self.student.config, "layer_map", None)
        return layer_pairs(spec.options["layers"], len(own), len(theirs), copied)

    def _tapped(self, need: str, side: int) -> frozenset[int]:
        """Layers of the student, side 0, or the teacher, that losses with such a need look at."""
        losses = (spec for spec in self.specs if need in spec.needs)
        return frozenset(pair[side] for spec in losses for pair in self._pairs[spec.name])

    def _add_projections(self, spec: LossSpec) -> None:
        models: tuple[Any, Any] = (self.student, self.teacher)
        embeds = "embedding" in spec.needs
        own, theirs = (
            x.get_input_embeddings().embedding_dim if embeds else x.config.hidden_size
            for x in models
        )
        if own == theirs:
            return
        weight = next(self.student.parameters())
        projections = nn.ModuleList()
        for at in range(1 if embeds else len(self._pairs[spec.name])):
            layer = nn.Linear(own, theirs, bias=False)
            # From a generator of its own: the same on all ranks, whatever they have drawn before.
            nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(at))
            projections.append(layer.to(weight))
        self.projections[spec.name] = projections


def packed_inputs(cu_seqlens: Tensor, input_ids: Tensor) -> dict[str, Any]:
    """What attention of transformers, and the mixer, know documents by."""
    longest = input_ids.shape[1]  # an upper bound, which needs no look at the device
    return {
        "position_ids": packed_positions(cu_seqlens),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _of_tokens(words: Words, input_ids: Tensor) -> Words:
    """(N, k) of a cache's, on the device."""
    found = each(by_token(words), lambda x: x.to(input_ids.device, non_blocking=True))
    if len(found.ids) != input_ids.numel():
        raise DistillError(
            f"losses: words must be of {input_ids.numel()} tokens, got {len(found.ids)}"
        )
    if found.logprobs.itemsize < 4:
        raise DistillError(
            f"losses: words must have float32 log-probabilities, got {found.logprobs.dtype}; a"
            " wrapper that casts inputs (cast_forward_inputs of FSDP2) must leave them"
        )
    return found
