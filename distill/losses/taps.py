"""What a model of transformers computes on the way to its logits, of one batch, run at most once.

Layers are tapped by hooks that are there while the model runs and gone when backward computes a
layer again, so that activation checkpointing gives nothing twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface

from distill.data.words import Kind, Words, each, join
from distill.errors import DistillError
from distill.hybrid.attention import MixerAttention, SoftmaxAttention
from distill.hybrid.convert import FAMILIES, PREFIX, RECURRENT, attention_function
from distill.hybrid.mixer import HybridMixer

# Types whose logits are those of the head and nothing more: no scale, no cap.
PLAIN_HEADS = {*FAMILIES, RECURRENT, "gpt_neox"}
IGNORED = -100  # as a label, as transformers has it
IMPLEMENTATION = "tapped_attention"
HEAD_ROWS = 512  # of logits that live at a time where only the likeliest words are kept


class Head(NamedTuple):
    weight_VE: Tensor
    bias_V: Tensor | None

    def narrowed(self, vocabulary: int) -> Head:
        """Of the first words, without a gradient."""
        bias = None if self.bias_V is None else self.bias_V[:vocabulary].detach()
        return Head(self.weight_VE[:vocabulary].detach(), bias)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a model besides its last hidden states; layers count from 0."""

    logits: bool = False
    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()


class Run:
    """One model over one batch: nothing runs before something of it is read, and then once.

    hidden_NE is what the head gets; N is B * T. The outputs of layers are those of the residual
    stream, before the model's last norm.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        inputs: Mapping[str, Any],
        wanted: Wanted = Wanted(),  # noqa: B008 - frozen
        grad: bool = False,
    ):
        self.model, self.input_ids, self.inputs = model, input_ids, inputs
        self.wanted, self.grad = wanted, grad and torch.is_grad_enabled()

    @property
    def has_plain_head(self) -> bool:
        family = self.model.config.model_type.removeprefix(PREFIX)
        return family in PLAIN_HEADS and type(self.model.get_output_embeddings()) is nn.Linear

    @property
    def is_linear(self) -> bool:
        """Whether a loss may start from `hidden_NE` and `head`, since nobody asks for logits."""
        return self.has_plain_head and not self.wanted.logits

    @property
    def head(self) -> Head:
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias)

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    @cached_property
    def logits_NV(self) -> Tensor:
        if not self.has_plain_head:
            return self._results["logits"].flatten(0, 1)
        with torch.set_grad_enabled(self.grad):
            return F.linear(self.hidden_NE, *self.head)

    @property
    def hidden_NE(self) -> Tensor:
        return self._results["hidden"].flatten(0, 1)

    @property
    def layers_BTE(self) -> dict[int, Tensor]:
        """Outputs of the layers that are wanted."""
        return self._results["layers"]

    @property
    def attention(self) -> dict[int, SoftmaxAttention | MixerAttention]:
        """Of the layers whose attention is wanted."""
        return self._results["attention"]

    @cached_property
    def embedding_BTE(self) -> Tensor:
        with torch.set_grad_enabled(self.grad):
            return self.model.get_input_embeddings()(self.input_ids)

    @torch.no_grad()
    def words(
        self, kind: Kind, positions: Tensor | None = None, vocabulary: int | None = None
    ) -> Any:
        """Those of the first `vocabulary` words after each token that `kind` keeps.

        positions: of the tokens in the text, for words that are drawn.
        """
        V = min(self.vocabulary, vocabulary or self.vocabulary)
        if self.is_linear:
            head = self.head.narrowed(V)
            device = self.input_ids.device.type
            if torch.is_autocast_enabled(device):  # once, not for each chunk
                weight_VE = head.weight_VE.to(torch.get_autocast_dtype(device))
                head = head._replace(weight_VE=weight_VE)
            chunks = (F.linear(x_NE, *head) for x_NE in self.hidden_NE.split(HEAD_ROWS))
        else:
            chunks = iter(self.logits_NV[:, :V].split(HEAD_ROWS))
        if positions is None:
            return join([kind.words(logits_NV) for logits_NV in chunks])
        at = positions.flatten().split(HEAD_ROWS)
        return join([kind.words(*part) for part in zip(chunks, at, strict=True)])

    @cached_property
    def _results(self) -> dict[str, Any]:
        call = {"use_cache": False, **self.inputs}
        with torch.set_grad_enabled(self.grad), tapped(self.model, self.wanted, self.grad) as taps:
            if self.has_plain_head:
                found = {"hidden": self.model.base_model(self.input_ids, **call)[0]}
            else:
                found = {"logits": self.model(self.input_ids, **call).logits}
        return found | taps


def next_words(labels_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The word after each token: the label one place on, none across the border of documents."""
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    if cu_seqlens is not None:
        targets_BT[:, cu_seqlens[1:].long() - 1] = IGNORED
    return targets_BT


def by_token(words: Words) -> Words:
    """Of all tokens in order: (N, ...), from that or from (B, T, ...)."""
    return words if words.ids.dim() == 2 else each(words, lambda x: x.flatten(0, 1))


@contextmanager
def tapped(model: Any, wanted: Wanted, grad: bool) -> Iterator[dict[str, dict[int, Any]]]:
    """What `wanted` names, filled in as the model runs within the context."""
    taps: dict[str, dict[int, Any]] = {"layers": {}, "attention": {}}

    def keep(kind: str, index: int, value: Any) -> None:
        if grad and not torch.is_grad_enabled():
            raise DistillError(
                "losses: activation checkpointing must be without use_reentrant where losses look"
                " into a layer, got use_reentrant=True"
            )
        taps[kind][index] = value

    with ExitStack() as stack:
        layers = decoder_layers(model) if wanted.layers or wanted.attention else ()
        for index in wanted.layers:
            stack.enter_context(_tapped_layer(layers[index], partial(keep, "layers", index)))
        for index in wanted.attention:
            attention = attention_of(model, layers[index])
            stack.enter_context(_tapped_attention(attention, partial(keep, "attention", index)))
        yield taps


@contextmanager
def _tapped_layer(layer: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        keep(output if isinstance(output, Tensor) else output[0])

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _tapped_attention(module: Any, keep: Callable[[Any], None]) -> Iterator[None]:
    """Tells `keep` what the module computes attention from."""
    mixer: HybridMixer | None = getattr(module, "mixer", None)
    if mixer is not None:
        mixer.observer = partial(_keep_mixer, mixer, keep)
        try:
            yield
        finally:
            mixer.observer = None
        return
    module.tap, module.tapped_config = keep, module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        module.config = module.tapped_config
        del module.tap, module.tapped_config


def _keep_mixer(
    mixer: HybridMixer,
    keep: Callable[[Any], None],
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    scale: float | None,
    mlstm_inputs: Any,
    o_BTH1: Tensor,
) -> None:
    options = mixer.options
    scale = mixer.head_dim**-0.5 if scale is None else scale
    local = SoftmaxAttention(q_BTHD, k_BTGD, scale, options.window, options.sinks)
    phi_q_BTHD, phi_k_BTHD, _, i_BTH, f_BTH = mlstm_inputs
    features = phi_q_BTHD, phi_k_BTHD, i_BTH, f_BTH, o_BTH1
    keep(MixerAttention(local, *features, options.input_gate))


def tapped_attention(
    module: Any, q_BHTD: Tensor, k_BGTD: Tensor, *args: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention implementation of a tapped module: its own, after it was tapped."""
    q_BTHD, k_BTGD = q_BHTD.transpose(1, 2), k_BGTD.transpose(1, 2)
    module.tap(SoftmaxAttention(q_BTHD, k_BTGD, scaling, kwargs.get("sliding_window")))
    own = attention_function(module.tapped_config, type(module))
    return own(module, q_BHTD, k_BGTD, *args, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATION, tapped_attention)


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """A model that FSDP2 has sharded, with the weights that none of its layers holds."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def decoder_layers(model: Any) -> nn.ModuleList:
    count = model.config.num_hidden_layers
    children = model.base_model.children()
    found = [x for x in children if isinstance(x, nn.ModuleList) and len(x) == count]
    if len(found) != 1:
        raise DistillError(
            f"losses: {type(model).__name__} must have one list of {count} layers in its base"
            f" model, got {len(found)}"
        )
    return found[0]


def require_documents(model: Any) -> None:
    """Raises DistillError for a model whose state goes on from one packed document to the next."""
    family = model.config.model_type
    if (
        getattr(model, "_is_stateful", False)
        and family != RECURRENT
        and not family.startswith(PREFIX)
    ):
        raise DistillError(
            f"documents: a model of type {family} does not keep packed ones apart; leave out"
            " boundaries (cu_seqlens)"
        )


def attention_of(model: Any, layer: nn.Module) -> Any:
    family = model.config.model_type.removeprefix(PREFIX)
    if family not in FAMILIES:
        raise DistillError(
            f"loss attention: models must be of type {', '.join(FAMILIES)}, got {family}"
        )
    return getattr(layer, FAMILIES[family][1])


def layer_pairs(
    layers: Any, student: int, teacher: int, copied: Sequence[int] | None = None
) -> tuple[tuple[int, int], ...]:
    """Which of the student's layers learns from which of the teacher's; both count from 0.

    Args:
        layers: "all": each from its own, of as many; "uniform": layer m of M, from 1, from layer
            m N / M of N, rounded up, so the last from the last; "every-K": layer m from layer K m;
            "last": the last from the last; "copied": each from the one that it began as; or a list
            of pairs, negative ones from the end.
        student, teacher: how many each has.
        copied: what each of the student's began as, `layer_map` of `compress`; None: not known.
    """
    if layers == "copied" and copied is not None and len(copied) == student:
        layers = list(enumerate(copied))
    if isinstance(layers, str):
        step = layers.removeprefix("every-")
        if layers == "last":
            return ((student - 1, teacher - 1),)
        if layers == "all" and student == teacher:
            return tuple((m, m) for m in range(student))
        if layers == "uniform":
            return tuple((m, -(-(m + 1) * teacher // student) - 1) for m in range(student))
        if step != layers and step.isdecimal() and 0 < int(step) * student <= teacher:
            return tuple((m, (m + 1) * int(step) - 1) for m in range(student))
    elif (
        isinstance(layers, Sequence)
        and len(layers) > 0
        and all(_is_pair(pair, student, teacher) for pair in layers)
    ):
        return tuple((s % student, t % teacher) for s, t in layers)
    raise DistillError(
        "losses: layers must be 'all' (of equally many), 'uniform', 'every-K' (K times the"
        " student's are there), 'last', 'copied' (of a student of `compress`, with its layer_map in"
        f" the configuration) or pairs [student's, teacher's] of {student} and {teacher}"
        f" layers, got {layers!r}"
    )


def _is_pair(pair: Any, student: int, teacher: int) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(index, int) for index in pair)
        and -student <= pair[0] < student
        and -teacher <= pair[1] < teacher
    )
