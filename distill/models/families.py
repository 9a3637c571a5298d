"""Where models of transformers keep what `compress` makes fewer or narrower.

An axis of a parameter is named for what it runs over: E the hidden width as a layer writes it, e
the same as a layer reads it behind a norm, H the query heads, G the heads of keys and values, F the
feed-forward's neurons, S the states of a mixer, "" what stays as it is. Several letters are so many
axes side by side in one, as "HGG" of queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from distill.hybrid.convert import PREFIX, RECURRENT
from distill.hybrid.options import HybridOptions


@dataclass(frozen=True)
class Family:
    """layers: the decoder's list of them. Names of modules below are within a layer.

    axes: by pattern of a parameter's name, as far as it is unique; none: only layers may be fewer.
    heads_out, neurons_out: what reads the heads and the feed-forward's neurons.
    norms: pattern of the weights of norms that read what layers hand on, None where they have none;
        last_norm: the decoder's, behind them all.
    reads: pattern of parameters with an axis e -> the norm before them, where that norm's weight
        can be moved into them.
    ffn: the configuration's name of the number of neurons.
    """

    layers: str
    axes: Mapping[str, tuple[str, ...]]
    heads_out: str = "self_attn.o_proj"
    neurons_out: str = "mlp.down_proj"
    norms: str | None = r"(layernorm|model\.norm)\.weight"
    last_norm: str = "norm"
    reads: Mapping[str, str] | None = None
    ffn: str = "intermediate_size"

    def axes_of(self, name: str, config: Any) -> tuple[str, ...]:
        """Of a parameter, by its name in the model."""
        axes = next(axes for pattern, axes in self.axes.items() if re.search(pattern, name))
        if "mixer." in name:
            options = HybridOptions.from_dict(config.hybrid)
            if name.endswith("output_weight") and options.output_gate == "x":
                return ("H", "e")
            # S is H or G, as the mixer's states are.
            states = "G" if options.grouped_heads == "share" else "H"
            return tuple(axis.replace("S", states) for axis in axes)
        return axes

    @cached_property
    def in_layer(self) -> re.Pattern[str]:
        """Matches a parameter's name up to the number of its layer."""
        return re.compile(rf"^(\w+\.{self.layers}\.)(\d+)(?=\.)")

    def norm_before(self, name: str) -> str | None:
        """Full name of the norm whose output a parameter reads, less the model's prefix."""
        for pattern, norm in (self.reads or {}).items():
            if re.search(pattern, name):
                found = self.in_layer.match(name)
                return f"{self.layers}.{found[2]}.{norm}" if found else norm
        return None


MIXER = {
    r"mixer\.feature_q": ("H", "", ""),
    r"mixer\.feature_k": ("S", "", ""),
    r"mixer\.gates\.weight": ("SS", "e"),
    r"mixer\.gates\.bias": ("SS",),
    r"mixer\.output_weight": ("H", ""),
    r"mixer\.output_bias": ("H",),
}
PROJECTIONS = MIXER | {
    r"embed_tokens\.weight": ("", "E"),
    r"lm_head\.weight": ("", "e"),
    r"q_proj\.weight": ("H", "e"),
    r"q_proj\.bias": ("H",),
    r"[kv]_proj\.weight": ("G", "e"),
    r"[kv]_proj\.bias": ("G",),
    r"o_proj\.weight": ("E", "H"),
    r"o_proj\.bias": ("E",),
    r"(gate|up)_proj\.weight": ("F", "e"),
    r"(gate|up)_proj\.bias": ("F",),
    r"down_proj\.weight": ("E", "F"),
    r"down_proj\.bias": ("E",),
}
LLAMA = Family(
    "layers",
    # Qwen 3 has norms of queries and keys, over a head.
    PROJECTIONS | {r"[qk]_norm\.weight": ("",), r"norm\.weight": ("E",)},
    reads={
        r"([qkv]_proj|mixer\.gates)\.weight|mixer\.output_weight": "input_layernorm",
        r"(gate|up)_proj\.weight": "post_attention_layernorm",
        r"lm_head\.weight": "norm",
    },
)
PHI3 = replace(
    LLAMA,
    axes={
        r"qkv_proj\.weight": ("HGG", "e"),
        r"gate_up_proj\.weight": ("FF", "e"),
        **LLAMA.axes,
    },
)
OLMO = Family("layers", PROJECTIONS, norms=None)
OLMO2 = Family(
    "layers",
    PROJECTIONS | {r"q_norm\.weight": ("H",), r"k_norm\.weight": ("G",), r"norm\.weight": ("E",)},
    norms=r"model\.norm\.weight",  # a layer's stand behind what they norm
)
GPT2 = Family(
    "h",
    MIXER
    | {
        r"wte\.weight|wpe\.weight": ("", "E"),
        r"ln_\w+\.(weight|bias)": ("E",),
        r"attn\.c_attn\.weight": ("e", "HHH"),
        r"attn\.c_attn\.bias": ("HHH",),
        r"attn\.c_proj\.weight": ("H", "E"),
        r"c_fc\.weight": ("e", "F"),
        r"c_fc\.bias": ("F",),
        r"mlp\.c_proj\.weight": ("F", "E"),
        r"c_proj\.bias": ("E",),
    },
    heads_out="attn.c_proj",
    neurons_out="mlp.c_proj",
    norms=r"ln_\w+\.weight",
    last_norm="ln_f",
    ffn="n_inner",
)
# transformers' model type -> family; a hybrid student's is that of its teacher.
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "ministral": LLAMA,
    "mistral": LLAMA,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "xlstm": Family("blocks", {}, last_norm="out_norm"),
    RECURRENT: Family("layers", {}),
}


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, None of one that is in none."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return FAMILIES.get(model_type.removeprefix(PREFIX))
