"""What an argument is, checked in the words that every operation uses. Shapes are its own."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor


def check_is_tensor(name: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: {argument} must be a dense tensor, got {value.layout}")


def check_is_number(name: str, argument: str, value: object) -> None:
    """A tensor is refused too: its gradient would be lost."""
    if not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")


def check_is_integer(name: str, argument: str, value: object) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}")
