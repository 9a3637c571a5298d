"""What a call of a distillation loss is beyond its tensors: names, ranges, and the order in which
every backend takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...arguments import check_is_integer, check_is_number

# In the order of csrc/launch.h's enums.
DIVERGENCES = ("forward", "reverse", "js", "skew", "skew_reverse", "tv")
REDUCTIONS = ("none", "sum", "mean", "batchmean")
# Mixtures that leave one of the two distributions alone.
_LIMITS = {
    ("js", 0.0): "forward",
    ("js", 1.0): "reverse",
    ("skew", 0.0): "forward",
    ("skew_reverse", 0.0): "reverse",
}
# Beyond these float32 has no digits left: T**2 times a divergence of 1 / T**2, or softmaxes whose
# exponents overflow.
TEMPERATURES = (1e-6, 1e6)
# A mixture with less of one distribution than this loses it where the other has no mass.
LEAST_BETA = 1e-20


class Options(NamedTuple):
    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0
    kl_weight: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    teacher_softcap: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"

    def checked(self, function: str) -> Options:
        """Within their ranges, the divergence being the one that it is at `beta`: at its ends a
        mixture is no mixture. Of weight 0 any is the forward one, whose gradient is never NaN."""
        _check(function, self)
        divergence = self.divergence
        for (name, end), limit in _LIMITS.items():  # torch.compile may not know beta: no hash
            if self.divergence == name and self.beta == end:
                divergence = limit
        divergence = "forward" if self.kl_weight == 0 else divergence
        return self._replace(divergence=divergence)


# Those that a schedule may change.
NUMBERS = slice(1, 9)
# The same for torch.library.
SCHEMA = (
    "str divergence, float beta, float temperature, float ce_weight, float kl_weight,"
    " float label_smoothing, float z_loss, float? softcap, float? teacher_softcap,"
    " int ignore_index, str reduction"
)


def unknown_numbers(options: tuple[Any, ...]) -> Tensor | None:
    """The numbers of options, (8,) float64 on the CPU, where torch.compile has them without a
    value, as it does once one has changed from call to call; else None. As an operator's arguments
    each value would be compiled anew, as a tensor none is; but a graph with a CPU tensor is none
    that CUDA graphs record."""
    if not torch.compiler.is_compiling():
        return None
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    numbers = [0.0 if number is None else number for number in options[NUMBERS]]
    if all(has_static_value(number) for number in numbers):
        return None
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([one * number for number in numbers])


def without_numbers(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What with_numbers() completes."""
    given = [None if number is None else 0.0 for number in options[NUMBERS]]
    return (*options[: NUMBERS.start], *given, *options[NUMBERS.stop :])


def with_numbers(options: tuple[Any, ...], numbers: Tensor) -> tuple[Any, ...]:
    given = [
        None if number is None else value
        for number, value in zip(options[NUMBERS], numbers.tolist(), strict=True)
    ]
    return (*options[: NUMBERS.start], *given, *options[NUMBERS.stop :])


def _check(function: str, options: Options) -> None:
    _check_kinds(function, options)
    if options.divergence not in DIVERGENCES:
        raise ValueError(
            f"{function}: divergence must be one of {_listed(DIVERGENCES)},"
            f" got {options.divergence!r}"
        )
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"{function}: reduction must be one of {_listed(REDUCTIONS)}, got {options.reduction!r}"
        )
    least, most = TEMPERATURES
    if not least <= options.temperature <= most:
        raise ValueError(
            f"{function}: temperature must be in [{least:g}, {most:g}], got {options.temperature}"
        )
    if not (options.beta == 0 or LEAST_BETA <= options.beta <= 1):
        raise ValueError(
            f"{function}: beta must be 0 or in [{LEAST_BETA:g}, 1], got {options.beta}"
        )
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(
            f"{function}: label_smoothing must be in [0, 1], got {options.label_smoothing}"
        )
    for name in ("softcap", "teacher_softcap"):
        cap = getattr(options, name)
        if cap is not None and not 0 < cap < float("inf"):
            raise ValueError(f"{function}: {name} must be finite and > 0, or None, got {cap}")


def _check_kinds(function: str, options: Options) -> None:
    for name, value in options._asdict().items():
        if name in ("divergence", "reduction"):
            continue
        if name == "ignore_index":
            check_is_integer(function, name, value)
        elif value is not None or not name.endswith("softcap"):
            check_is_number(function, name, value)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
