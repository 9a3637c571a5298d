"""`compress`: a smaller student of the teacher's own kind, whose weights begin as the teacher's.

Fewer layers, as DistilBERT's students have; a narrower hidden width, fewer heads and fewer neurons
of the feed-forward, as Minitron's. What is kept is chosen by what it does (importance.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import DistillError
from distill.hybrid.options import HybridOptions
from distill.models.families import FAMILIES, Family, family_of
from distill.models.selection import Selection, head_dim

METHODS = ("weight", "activation", "svd")


class Compressed(NamedTuple):
    """A student and how it stands to its teacher, as losses between their layers need it.

    layer_map: for each of the student's layers, the teacher's that it began as; also
        `student.config.layer_map`, which is saved with it.
    projection: (E of the student, E of the teacher): the student's hidden states begin near
        projection @ the teacher's. None where the width is the teacher's.
    """

    student: PreTrainedModel
    layer_map: list[int]
    projection: Tensor | None


def compress(
    teacher: PreTrainedModel,
    *,
    layers: int | str | Sequence[int] | None = None,
    layer_map: str = "spread",
    width: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn: int | None = None,
    method: str | None = None,
    inputs: Tensor | Iterable[Tensor] | None = None,
) -> Compressed:
    """A student with fewer layers, or a narrower one, or both; the teacher stays as it is.

    Args:
        teacher: a causal language model that `hybridize` takes, with attention or its mixers. Of
            type xlstm or slstm: `layers` alone.
        layers: which of the teacher's the student keeps. A number, chosen by `layer_map`;
            "every-2": each second one from the first, with `layer_map` "uniform" from the second;
            or a list of indices, rising. None: all.
        layer_map: "spread": from the first to the last at even distances, as DistilBERT; "uniform":
            the last of each of as many equal groups, TinyBERT's m N / M; "first"; "last";
            "influence": those that change what passes through them most, for which `inputs` is
            needed.
        width, heads, ffn: of the hidden states, query heads and neurons of the feed-forward. The
            dimension of a head stays. GPT-2's width is heads x dimension of a head.
        kv_heads: heads of keys and values; None keeps the number of queries' heads that share one.
        method: what decides which channels, heads and neurons stay. "weight": the size of their
            weights; "activation": how much they do on `inputs`; "svd": as "activation", but in
            place of channels the width has the principal directions of the hidden states on
            `inputs`, not in Olmo and GPT-2. None: "activation" with `inputs`, "weight" without.
        inputs: ids (B, T), or several such batches; a few thousand tokens do.

    Raises:
        DistillError: the teacher is none of these, or a size does not fit.

    Example:
        >>> import distill, torch, transformers
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> sizes |= {"vocab_size": 99, "intermediate_size": 64, "num_hidden_layers": 4}
        >>> teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> ids = torch.randint(99, (2, 64))
        >>> student, layer_map, _ = distill.compress(teacher, layers=2, ffn=48, inputs=ids)
        >>> layer_map, student.config.intermediate_size
        ([0, 3], 48)
    """
    family = family_of(teacher)
    if family is None or not isinstance(teacher, PreTrainedModel):
        raise DistillError(
            "compress: teacher must be a causal language model of transformers, of type"
            f" {', '.join(FAMILIES)}, got {type(teacher).__name__}"
        )
    narrower = {"width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
    if not family.axes and any(size is not None for size in narrower.values()):
        raise DistillError(
            "compress: width, heads, kv_heads and ffn must be None for a teacher of type"
            f" {teacher.config.model_type}, got"
            f" {', '.join(name for name, size in narrower.items() if size is not None)}"
        )
    how = _method(method, inputs, family, width)
    chosen = Selection(teacher, family, how, inputs, layer_map)
    kept = chosen.layers(layers)
    student = _student(teacher, chosen.sizes(**narrower), kept)
    _copy_weights(student, chosen, kept)
    return Compressed(student, kept, chosen.projection)


def _method(method: str | None, inputs: Any, family: Family, width: int | None) -> str:
    if method is None:
        return "weight" if inputs is None else "activation"
    if method not in METHODS:
        raise DistillError(f"compress: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method != "weight" and inputs is None:
        raise DistillError(f"compress: inputs must be given for method {method!r}, got None")
    if method == "svd" and width is not None and not family.reads:
        raise DistillError(
            "compress: method must be 'weight' or 'activation' for the width of a model whose norms"
            " cannot be rotated, got 'svd'"
        )
    return method


def _student(teacher: Any, sizes: dict[str, int], kept: list[int]) -> Any:
    """A model of other sizes, its weights not yet the teacher's."""
    settings = teacher.config.to_dict() | sizes | {"layer_map": kept}
    for name in ("num_hidden_layers", "n_layer", "num_blocks"):
        if name in settings:
            settings[name] = len(kept)
    for name in ("layer_types", "no_rope_layers"):
        if settings.get(name):
            settings[name] = [settings[name][index] for index in kept]
    if "head_dim" in settings or {"hidden_size", "num_attention_heads"} & sizes.keys():
        settings["head_dim"] = head_dim(teacher.config)
    if "hybrid" in settings:
        count = teacher.config.num_hidden_layers
        mixers = set(HybridOptions.from_dict(settings["hybrid"]).replaced(count))
        stay = [at for at, index in enumerate(kept) if index in mixers]
        if not stay:
            raise DistillError(f"compress: layers must keep one of the mixers', got {kept}")
        settings["hybrid"] = settings["hybrid"] | {"layers": stay}
    try:
        config = type(teacher.config).from_dict(settings)
    except (StrictDataclassError, ValueError) as error:
        raise DistillError(f"compress: sizes must fit one another, got {sizes}: {error}") from error
    config._attn_implementation = teacher.config._attn_implementation
    student = type(teacher)(config).to(device=teacher.device, dtype=teacher.dtype)
    student.tie_weights()  # on the meta device, a move gives each its own
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


@torch.no_grad()
def _copy_weights(student: Any, chosen: Selection, kept: list[int]) -> None:
    theirs = dict(chosen.teacher.named_parameters())
    in_layer = chosen.family.in_layer
    for name, parameter in student.named_parameters():
        found = in_layer.match(name)
        at = int(found[2]) if found else -1
        theirs_at = kept[at] if found else None
        source = in_layer.sub(rf"\g<1>{theirs_at}", name)
        weight = chosen.part(source, theirs[source], theirs_at)
        parameter.copy_(weight)
        if (
            theirs_at is not None
            and "c_attn" in name
            and getattr(student.config, "scale_attn_by_inverse_layer_idx", False)
        ):
            # Scores are divided by the layer's number, which is another one in the student.
            queries = parameter[..., : parameter.shape[-1] // 3]
            queries.mul_((at + 1) / (theirs_at + 1))
