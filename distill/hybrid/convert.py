"""`hybridize`: decoder models of Hugging Face transformers with the hybrid mixer for attention.

An attention module keeps its projections, norms and position embedding. What lies between those
and its output projection is what transformers calls an attention implementation, and the mixer is
one: the module's class passes it two more arguments, its own input and its part of the cache.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.errors import DistillError
from distill.hybrid.cache import HybridCache, HybridCacheLayer
from distill.hybrid.mixer import HybridMixer, Rotation
from distill.hybrid.options import HybridOptions

# transformers' model type -> where its decoder has the layers, and a layer the attention.
FAMILIES = {
    "gpt2": ("h", "attn"),
    "llama": ("layers", "self_attn"),
    "ministral": ("layers", "self_attn"),
    "mistral": ("layers", "self_attn"),
    "olmo": ("layers", "self_attn"),
    "olmo2": ("layers", "self_attn"),
    "olmo3": ("layers", "self_attn"),
    "phi3": ("layers", "self_attn"),
    "qwen2": ("layers", "self_attn"),
    "qwen3": ("layers", "self_attn"),
    "smollm3": ("layers", "self_attn"),
}
PREFIX = "hybrid_"  # of a student's model type
RECURRENT = "slstm"  # the model type of `distill.models.recurrent`
IMPLEMENTATION = "hybrid_mixer"


def hybridize(
    teacher: PreTrainedModel,
    *,
    window: int = 512,
    sinks: int = 4,
    copy_weights: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The teacher with the hybrid mixer for attention; the teacher itself stays as it is.

    Args:
        teacher: a causal language model of transformers, of a type in `FAMILIES`: GPT-2, Llama,
            Mistral and Ministral, Olmo 1 to 3, Phi-3, Qwen 2 and 3, SmolLM3.
        window, sinks, **options: of `HybridOptions`, which says what each stands for.
        copy_weights: whether the student has its own copy of the teacher's weights. Otherwise its
            parameters are the teacher's: they take no memory, and who trains one trains both.

    Returns:
        A model as the teacher's, which generates with a cache of constant size, is written by
        `save_pretrained` and read by `load_student`. Packed documents are told by `cu_seq_lens_q`;
        otherwise the state goes from one to the next. Padding is refused. The parameters that the
        teacher lacks (`new_parameters`) have the dtype of its weights.

    Raises:
        DistillError: the teacher is none of these, or an option does not fit.

    Example:
        >>> import distill, torch, transformers
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> sizes |= {"vocab_size": 99, "intermediate_size": 64, "num_hidden_layers": 2}
        >>> teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> student = distill.hybridize(teacher, window=16)
        >>> student.generate(torch.tensor([[5, 6, 7]]), max_length=9, min_length=9).shape
        torch.Size([1, 9])
    """
    model_type = getattr(getattr(teacher, "config", None), "model_type", None)
    if model_type not in FAMILIES or type(teacher) is not _causal_lm(model_type):
        raise DistillError(
            "hybridize: teacher must be a causal language model of transformers, of type"
            f" {', '.join(FAMILIES)}, got {type(teacher).__name__}"
        )
    chosen = HybridOptions.from_dict(options | {"window": window, "sinks": sinks})
    config_class, model_class = student_classes(model_type)
    settings = teacher.config.to_dict() | {"architectures": [model_class.__name__]}
    del settings["model_type"]
    config = config_class.from_dict(settings | {"hybrid": chosen.as_dict()})
    config._attn_implementation = teacher.config._attn_implementation
    # What is in the memo is taken over as it is.
    memo: dict[int, Any] = {id(teacher.config): config}
    if not copy_weights:
        memo |= {id(parameter): parameter for parameter in teacher.parameters()}
    student = copy.deepcopy(teacher, memo)
    student.__class__ = model_class
    _install(student)
    return student


def load_student(path: Any, *, window: int | None = None, **options: Any) -> PreTrainedModel:
    """What `save_pretrained` of a student, or an sLSTM, has written, from safetensors alone.

    `window`: another one than the student was trained with, as the paper's 256 after 512. **options
    go to `from_pretrained`. No code beside the weights is run, and nothing is unpickled.

    Raises:
        DistillError: `path` has another model, or weights that are not all of the student's.
    """
    settings, _ = PretrainedConfig.get_config_dict(path)
    model_type = settings.get("model_type", "")
    model_class: Any
    if model_type == RECURRENT:
        from distill.models.recurrent import SLSTMForCausalLM as model_class

        if window is not None:
            raise DistillError(
                f"load_student: window must be None for a model of type {RECURRENT}, got {window}"
            )
    elif is_student(model_type):
        hybrid = HybridOptions.from_dict(settings.get("hybrid"))
        config_class, model_class = student_classes(model_type.removeprefix(PREFIX))
        if window is not None:
            options["config"] = config_class.from_pretrained(path)
            options["config"].hybrid = replace(hybrid, window=window).as_dict()
    else:
        wanted = ", ".join([*(PREFIX + family for family in FAMILIES), RECURRENT])
        raise DistillError(
            f"load_student: model_type in {path} must be one of {wanted}, got {model_type!r}"
        )
    student, found = model_class.from_pretrained(
        path, output_loading_info=True, use_safetensors=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):
            raise DistillError(
                f"load_student: {path} must have exactly the student's weights, got"
                f" {kind.replace('_', ' ')} {', '.join(names[:3])} ({len(names)} in all)"
            )
    return student


def is_student(model_type: str) -> bool:
    """Whether `load_student` reads models of this type, which transformers does not know."""
    return model_type == RECURRENT or (
        model_type.startswith(PREFIX) and model_type.removeprefix(PREFIX) in FAMILIES
    )


def new_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """Names and parameters of the mixers, which the teacher lacks."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in student.named_modules()
        if isinstance(module, HybridMixer)
        for name, parameter in module.named_parameters()
    }


@cache
def student_classes(family: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Configuration and model of a family's students; known to transformers' Auto classes since."""
    config_base, model_base = CONFIG_MAPPING[family], _causal_lm(family)
    config_class = type(
        f"Hybrid{config_base.__name__}",
        (config_base,),
        {"model_type": PREFIX + family, "__module__": __name__},
    )
    model_class = type(
        f"Hybrid{model_base.__name__}",
        (_Student, model_base),
        {"config_class": config_class, "__module__": __name__},
    )
    AutoConfig.register(PREFIX + family, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


class _Student:
    """What a student's class has before the teacher's."""

    # Of generate(): a state does not go back to an earlier token, as drafted ones would need.
    _is_stateful = True

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _install(self)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the decoder makes its own


class _HybridAttention:
    """What an attention's class has before the teacher's."""

    layer_idx: int
    mixer: HybridMixer

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: HybridCache | None = None,
        **kw: Any,
    ) -> Any:
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        kw |= {"past_key_values": None, "mixer_input": hidden_states, "mixer_cache": layer}
        if getattr(self, "use_rope", True):
            kw["mixer_rotation"] = kw.get("position_embeddings")
        return super().forward(hidden_states, *args, **kw)  # type: ignore[misc]


def mixer_attention(
    module: Any,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    mixer_input: Tensor,
    mixer_cache: HybridCacheLayer | None,
    mixer_observer: Callable[..., None] | None = None,
    mixer_rotation: Rotation | None = None,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation that runs a module's mixer.

    With `mixer_observer` the teacher's attention goes on instead, after a call of
    mixer_observer(mixer, [x, q, k, v] as the mixer takes them, attention (B, T, H, D), scale=,
    rotation=, cu_seqlens=).
    """
    # Under autocast the position embedding leaves q and k in float32.
    heads = [x.to(v_BGTD.dtype) for x in (q_BHTD, k_BGTD, v_BGTD)]
    tensors = [mixer_input, *(x.transpose(1, 2) for x in heads)]
    mixer: HybridMixer = module.mixer
    how: dict[str, Any] = {"scale": scaling, "rotation": mixer_rotation}
    if mixer_observer is not None:
        attention = attention_function(module.model_config, module.teacher_class)
        h_BTHD, _ = attention(
            *(module, *heads, attention_mask), scaling=scaling, dropout=0.0, **kwargs
        )
        mixer_observer(mixer, tensors, h_BTHD, cu_seqlens=cu_seq_lens_q, **how)
        return h_BTHD, None
    if mixer_cache is None:
        return mixer(*tensors, cu_seqlens=cu_seq_lens_q, **how), None
    return mixer_cache.run(mixer, tensors, **how), None


AttentionInterface.register(IMPLEMENTATION, mixer_attention)


def attention_function(config: PretrainedConfig, attention_class: type) -> Any:
    """The implementation that a config is set to; "eager" is a function beside the class."""
    eager = sys.modules[attention_class.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)


@cache
def _attention_class(base: Any) -> type:
    names = {"teacher_class": base, "__module__": __name__}
    return type(f"Hybrid{base.__name__}", (_HybridAttention, base), names)


def _causal_lm(family: str) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


def _install(model: Any) -> None:
    """Put the mixers that `config.hybrid` describes into a teacher's model."""
    config, decoder = model.config, model.base_model
    options = HybridOptions.from_dict(config.hybrid)
    layers_name, attention_name = FAMILIES[config.model_type.removeprefix(PREFIX)]
    layers = getattr(decoder, layers_name)
    heads, width = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    for index in options.replaced(len(layers)):
        attention = getattr(layers[index], attention_name)
        weight = next(attention.parameters())
        base: Any = type(attention)
        attention.__class__ = _attention_class(base)
        attention.mixer = HybridMixer(width, heads, kv_heads, head_dim, options).to(weight)
        attention.model_config = config
        # Of this module alone: layers that are not replaced, and masks, stay with the model's.
        attention.config = copy.copy(config)
        attention.config._attn_implementation = IMPLEMENTATION
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    decoder.register_forward_pre_hook(partial(_before_decoder, names), with_kwargs=True)


def _before_decoder(
    names: tuple[str, ...], decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Make the cache, place packed documents, and refuse what the mixer would not honour."""
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    mask = kwargs.pop("attention_mask", None)
    if mask is not None and not (mask.dim() == 2 and bool(mask.all())):
        raise DistillError(
            "hybrid model: attention_mask must be None or (B, T) of ones, got"
            f" {'zeros' if mask.dim() == 2 else tuple(mask.shape)}: the mixer knows no padding;"
            " batch prompts of one length, or pack them and pass cu_seq_lens_q"
        )
    cu_seqlens, use_cache = kwargs.get("cu_seq_lens_q"), kwargs.get("use_cache")
    given = kwargs.get("past_key_values")
    if use_cache is None:
        use_cache = decoder.config.use_cache and not decoder.training and cu_seqlens is None
    if cu_seqlens is not None:
        if use_cache or given is not None:
            raise DistillError(
                "hybrid model: use_cache must be False for packed documents (cu_seq_lens_q),"
                " got True"
            )
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = packed_positions(cu_seqlens)
    if given is not None and not isinstance(given, HybridCache):
        raise DistillError(
            f"hybrid model: past_key_values must be a HybridCache, got {type(given).__name__}"
        )
    if given is None and use_cache:
        kwargs["past_key_values"] = HybridCache(decoder.config)
    return (), kwargs | {"use_cache": use_cache}


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """(1, T): each token's place in its own document."""
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    return (torch.arange(len(starts), device=starts.device) - starts)[None]
