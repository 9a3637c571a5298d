"""`merge`: several trained students of one architecture as one, theta = sum_i lambda_i theta_i.

Source: arXiv 2603.15590, section 3.4, equation 14: lambda_i >= 0, and they sum to 1. Weights are
read a tensor at a time and written a shard at a time: experts may be larger than memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.data.capture import load_model
from distill.errors import DistillError
from distill.files import replace_folder, require_place

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 2 << 30
# Of the first expert beside its weights: configurations, tokenizers, templates; never a pickle.
COPIED = {".json", ".txt", ".model", ".tiktoken", ".jinja"}
# Of a configuration: these may differ between experts.
UNSHAPED = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "layer_map"}


def merge(
    experts: Mapping[str, str | Path],
    weights: str | Mapping[str, float] = "uniform",
    *,
    out: str | Path,
) -> Path:
    """Write the weighted mean of models to `out`, with the first one's configuration and tokenizer.

    Args:
        experts: folders that `save_pretrained` wrote, by name.
        weights: "uniform", or a number for each name, none negative, that sum to 1.
        out: the folder to write; one that is there is replaced when all is written.

    Returns:
        `out`, as a path.

    Raises:
        DistillError: the experts differ in more than their weights, or the weights do not fit.
    """
    shares = _shares(experts, weights)
    read = {name: Weights(Path(path)) for name, path in experts.items()}
    require_alike(read)
    require_place(Path(out), *(weights.folder for weights in read.values()))
    replace_folder(Path(out), lambda to: _write(to, read, shares))
    return Path(out)


@dataclass(frozen=True)
class Trial:
    """A choice of weights and its score, less being better."""

    weights: dict[str, float]
    score: float


@torch.no_grad()
def sweep(
    experts: Mapping[str, str | Path],
    score: Callable[[Any], float],
    *,
    steps: int = 4,
    after_trial: Callable[[Trial, int, int], None] = lambda trial, done, total: None,
) -> list[Trial]:
    """Try all weights that are multiples of 1 / steps; the best first.

    Args:
        experts: as in `merge`.
        score: of a merged model, less being better; as lambda m: evaluate(m, ...).bits_per_byte.
        after_trial: called with each trial, how many are done, and how many there are.
    """
    read = {name: Weights(Path(path)) for name, path in experts.items()}
    require_alike(read)
    model = load_model(next(iter(read.values())).folder)
    names = list(experts)
    counts = list(_splits(steps, len(names)))
    trials = []
    for parts in counts:
        shares = {name: part / steps for name, part in zip(names, parts, strict=True)}
        for name, parameter in model.state_dict(keep_vars=True).items():
            if name in next(iter(read.values())):
                parameter.copy_(_mean(name, read, shares))
        trials.append(Trial(shares, score(model)))
        after_trial(trials[-1], len(trials), len(counts))
    return sorted(trials, key=lambda trial: trial.score)


class Weights:
    """The tensors of a folder's safetensors, each read when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            if (folder / INDEX).exists():
                self.files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            else:
                with safe_open(folder / SINGLE, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), SINGLE)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise DistillError(f"merge: cannot read a model from {folder}: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def require_alike(read: Mapping[str, Weights]) -> None:
    """Raises DistillError, naming what differs, unless all have one architecture."""
    (first, one), *others = read.items()
    for name, other in others:
        for key in sorted(one.config.keys() | other.config.keys()):
            a, b = one.config.get(key), other.config.get(key)
            if key not in UNSHAPED and a != b:
                raise DistillError(
                    f"merge: experts must have one architecture: {key} is {a!r} in {first} and"
                    f" {b!r} in {name}"
                )
        if differing := sorted(one.files.keys() ^ other.files.keys()):
            raise DistillError(
                f"merge: {first} and {name} must have the same weights, but {differing[0]} is in"
                f" one alone ({len(differing)} in all)"
            )
        for weight in one.files:
            if one.shape(weight) != other.shape(weight):
                raise DistillError(
                    f"merge: {weight} must have one shape, got {one.shape(weight)} in {first} and"
                    f" {other.shape(weight)} in {name}"
                )


def _shares(experts: Mapping[str, Any], weights: str | Mapping[str, float]) -> dict[str, float]:
    if not experts:
        raise DistillError("merge: experts must be at least one model, got none")
    if weights == "uniform":
        return dict.fromkeys(experts, 1 / len(experts))
    if isinstance(weights, str) or weights.keys() != experts.keys():
        got = repr(weights) if isinstance(weights, str) else ", ".join(weights)
        raise DistillError(
            f"merge: weights must be 'uniform' or a number for each of {', '.join(experts)}, got"
            f" {got}"
        )
    if not (min(weights.values()) >= 0 and math.isclose(sum(weights.values()), 1, abs_tol=1e-6)):
        shown = ", ".join(f"{name}={value:g}" for name, value in weights.items())
        raise DistillError(f"merge: weights must be at least 0 and sum to 1, got {shown}")
    return dict(weights)


def _mean(name: str, read: Mapping[str, Weights], shares: Mapping[str, float]) -> Tensor:
    mean: Tensor | None = None
    for expert, weights in read.items():
        tensor = weights[name]
        if not tensor.is_floating_point():
            return tensor
        if shares[expert] == 0:
            continue
        # In float64: a mean of equals is then what they are, in their own dtype.
        part = shares[expert] * tensor.double()
        mean = part if mean is None else mean.add_(part)
    assert mean is not None
    return mean.to(next(iter(read.values()))[name].dtype)


def _write(to: Path, read: Mapping[str, Weights], shares: Mapping[str, float]) -> None:
    first = next(iter(read.values()))
    to.mkdir()
    for file in sorted(first.folder.iterdir()):
        if file.suffix in COPIED and not file.name.endswith(".index.json") and file.is_file():
            shutil.copyfile(file, to / file.name)
    shards: list[dict[str, Tensor]] = [{}]
    placed: dict[str, int] = {}
    total = size = 0
    for name in first.files:
        tensor = _mean(name, read, shares)
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            _save(shards[-1], to, len(shards))
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        placed[name] = len(shards)
        size += tensor.nbytes
        total += tensor.nbytes
    _save(shards[-1], to, len(shards))
    files = {at: _shard(at) for at in range(1, len(shards) + 1)}
    if len(files) == 1:
        (to / files[1]).rename(to / SINGLE)
        return
    index = {"metadata": {"total_size": total}, "weight_map": {n: files[placed[n]] for n in placed}}
    (to / INDEX).write_text(json.dumps(index, indent=1))


def _shard(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _save(tensors: dict[str, Tensor], to: Path, number: int) -> None:
    save_file(tensors, to / _shard(number), {"format": "pt"})


def _splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to deal `total` to so many parts."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _splits(total - first, parts - 1):
            yield (first, *rest)
