"""Which layers, heads, neurons and channels of a teacher its student keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.models.families import Family
from distill.models.importance import Importance, of_activations, of_weights

LAYER_MAPS = ("spread", "uniform", "first", "last", "influence")


@dataclass
class Selection:
    """What of a teacher stays: filled in by `sizes`, and read while weights are copied."""

    teacher: Any
    family: Family
    method: str
    inputs: Any
    layer_map: str
    heads_LH: Tensor | None = None  # indices that stay; None: all
    groups_LG: Tensor | None = None
    neurons_LF: Tensor | None = None
    channels_E: Tensor | None = None
    rotation: Tensor | None = None  # (E of the student, E of the teacher)
    norm_scale: float = 1.0

    @cached_property
    def activations(self) -> Importance:
        batches = [self.inputs] if isinstance(self.inputs, Tensor) else self.inputs
        return of_activations(self.teacher, self.family, batches, self.method == "svd")

    @cached_property
    def importance(self) -> Importance:
        return (
            of_weights(self.teacher, self.family) if self.method == "weight" else self.activations
        )

    @property
    def projection(self) -> Tensor | None:
        if self.rotation is not None or self.channels_E is None:
            return self.rotation
        return torch.eye(self.teacher.config.hidden_size)[self.channels_E]

    def layers(self, wanted: int | str | Sequence[int] | None) -> list[int]:
        """Indices of the teacher's layers that stay, rising."""
        count = len(getattr(self.teacher.base_model, self.family.layers))
        if self.layer_map not in LAYER_MAPS:
            raise DistillError(
                f"compress: layer_map must be one of {', '.join(LAYER_MAPS)},"
                f" got {self.layer_map!r}"
            )
        if wanted is None:
            return list(range(count))
        if isinstance(wanted, str):
            step = wanted.removeprefix("every-")
            if step == wanted or not step.isdecimal() or not int(step):
                raise DistillError(f"compress: layers must be as 'every-2', got {wanted!r}")
            begin = int(step) - 1 if self.layer_map == "uniform" else 0
            kept = list(range(begin, count, int(step)))
            if not kept:
                raise DistillError(f"compress: layers must be every {count} at most, got {wanted}")
            return kept
        if isinstance(wanted, int):
            if not 1 <= wanted <= count:
                raise DistillError(f"compress: layers must be 1 to {count}, got {wanted}")
            return self._mapped(wanted, count)
        kept = list(wanted)
        rising = all(a < b for a, b in pairwise(kept))
        if not kept or not rising or kept[0] < 0 or kept[-1] >= count:
            raise DistillError(
                f"compress: layers must be rising indices of {count} layers, got {kept}"
            )
        return kept

    def _mapped(self, wanted: int, count: int) -> list[int]:
        if self.layer_map == "influence":
            if self.inputs is None:
                raise DistillError("compress: inputs must be given for 'influence', got None")
            change_L = self.activations.layers_L
            assert change_L is not None
            return change_L.topk(wanted).indices.sort().values.tolist()
        if self.layer_map == "spread":
            between = max(1, wanted - 1)
            return [round(m * (count - 1) / between) for m in range(wanted)]
        if self.layer_map == "uniform":
            return [(m + 1) * count // wanted - 1 for m in range(wanted)]
        first = 0 if self.layer_map == "first" else count - wanted
        return list(range(first, first + wanted))

    def sizes(
        self, width: int | None, heads: int | None, kv_heads: int | None, ffn: int | None
    ) -> dict[str, int]:
        """Choose what stays; the changed settings of the configuration."""
        config = self.teacher.config
        changed: dict[str, int] = {}
        if heads is not None or kv_heads is not None:
            changed |= self._choose_heads(heads, kv_heads)
        if ffn is not None:
            _require_size("ffn", ffn, neurons := self.importance.neurons_LF)
            self.neurons_LF = _largest(neurons, ffn)
            changed[self.family.ffn] = ffn
        if self.family.ffn == "n_inner":
            wanted = changed.get("num_attention_heads", config.n_head) * head_dim(config)
            if wanted != (config.hidden_size if width is None else width):
                raise DistillError(
                    f"compress: width must be heads x dimension of a head in GPT-2, {wanted}, got"
                    f" {config.hidden_size if width is None else width}"
                )
            # None stands for 4 x width.
            changed.setdefault("n_inner", config.n_inner or 4 * config.hidden_size)
        if width is not None:
            self._choose_width(width)
            changed["hidden_size"] = width
        return changed

    def _choose_heads(self, heads: int | None, kv_heads: int | None) -> dict[str, int]:
        config, heads_LH = self.teacher.config, self.importance.heads_LH
        H = config.num_attention_heads
        G = getattr(config, "num_key_value_heads", None) or H
        heads = H if heads is None else heads
        _require_size("heads", heads, heads_LH)
        if kv_heads is None:
            kv_heads, rest = divmod(heads * G, H)
            if rest:
                raise DistillError(
                    f"compress: heads must be a multiple of {H // G}, which share keys and values,"
                    f" or kv_heads be given, got {heads}"
                )
        if not 1 <= kv_heads <= G or heads % kv_heads or heads // kv_heads > H // G:
            raise DistillError(
                f"compress: kv_heads must be at most {G}, divide heads = {heads} and be shared by"
                f" at most {H // G} of them, got {kv_heads}"
            )
        shared_LGR = heads_LH.unflatten(1, (G, -1))
        self.groups_LG = _largest(shared_LGR.sum(-1), kv_heads)
        rows_L1 = torch.arange(len(heads_LH))[:, None]
        of_groups_LGR = shared_LGR[rows_L1, self.groups_LG]
        inside_LGR = _largest(of_groups_LGR, heads // kv_heads)
        self.heads_LH = (self.groups_LG[..., None] * (H // G) + inside_LGR).flatten(1)
        changed = {"num_attention_heads": heads}
        if hasattr(config, "num_key_value_heads"):
            changed |= {"num_key_value_heads": kv_heads}
        return changed

    def _choose_width(self, width: int) -> None:
        hidden_E = self.importance.hidden_E
        _require_size("width", width, hidden_E)
        if self.method == "svd":
            covariance_EE = self.importance.covariance_EE
            assert covariance_EE is not None
            values_E, vectors_EE = torch.linalg.eigh(covariance_EE)
            self.rotation = vectors_EE[:, -width:].T.flip(0).float()
            share = float(values_E[-width:].sum() / values_E.sum())
        else:
            self.channels_E = _largest(hidden_E, width)
            share = float(hidden_E[self.channels_E].sum() / hidden_E.sum())
        # A norm divides by the root of a mean: what is kept has this times the mean of what was.
        self.norm_scale = math.sqrt(share * len(hidden_E) / width)

    def part(self, name: str, weight: Tensor, layer: int | None) -> Tensor:
        """What the student gets of a parameter of the teacher's."""
        if not self.family.axes:
            return weight
        norms, axes = self.family.norms, self.family.axes_of(name, self.teacher.config)
        is_norm = norms is not None and re.search(norms, name) is not None
        if is_norm and self.rotation is not None:
            return self._rotated_norm(name, weight)
        for dim, axis in enumerate(axes):
            if axis in ("E", "e"):
                weight = self._of_width(name, weight, dim, axis)
            elif axis and layer is not None:
                weight = self._of_layer(weight, dim, axis, layer)
        # What reads a norm without weights has its scale.
        scaled = is_norm or (norms is None and "e" in axes)
        return weight * self.norm_scale if scaled else weight

    def _of_width(self, name: str, weight: Tensor, dim: int, axis: str) -> Tensor:
        if self.channels_E is not None:
            return weight.index_select(dim, self.channels_E.to(weight.device))
        if self.rotation is None:
            return weight
        weight = weight.movedim(dim, -1).float()
        norm = self.family.norm_before(name) if axis == "e" else None
        if norm is not None:
            weight = weight * self.teacher.base_model.get_submodule(norm).weight
        return (weight @ self.rotation.to(weight.device).T).movedim(-1, dim)

    def _rotated_norm(self, name: str, weight_E: Tensor) -> Tensor:
        """Ones, where what reads the norm has its weight; the embedding of tied words cannot."""
        assert self.rotation is not None
        rotation = self.rotation.to(weight_E.device)
        last = name.endswith(f".{self.family.last_norm}.weight")
        if last and self.teacher.config.tie_word_embeddings:
            return self.norm_scale * rotation.square() @ weight_E.float()
        return self.norm_scale * torch.ones_like(rotation[:, 0])

    def _of_layer(self, weight: Tensor, dim: int, axis: str, layer: int) -> Tensor:
        of_axis = {"H": self.heads_LH, "G": self.groups_LG, "F": self.neurons_LF}
        chosen = [kept_LX[layer] for x in axis if (kept_LX := of_axis[x]) is not None]
        if not chosen:
            return weight
        counts = [self._count(letter) for letter in axis]
        size = weight.shape[dim] // sum(counts)
        parts = weight.split([count * size for count in counts], dim)
        kept = [
            part.unflatten(dim, (-1, size)).index_select(dim, index.to(weight.device))
            for part, index in zip(parts, chosen, strict=True)
        ]
        return torch.cat(kept, dim).flatten(dim, dim + 1)

    def _count(self, axis: str) -> int:
        """How many the teacher has."""
        config = self.teacher.config
        if axis == "F":
            assert self.neurons_LF is not None
            return self.importance.neurons_LF.shape[1]
        heads: int = config.num_attention_heads
        return heads if axis == "H" else getattr(config, "num_key_value_heads", None) or heads


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last dimension, rising."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def _require_size(name: str, got: int, scores: Tensor) -> None:
    most = scores.shape[-1]
    if not isinstance(got, int) or not 1 <= got <= most:
        raise DistillError(f"compress: {name} must be at least 1 and at most {most}, got {got!r}")


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
