"""What public functions ask of their arguments, in the words that every one of them uses: function,
argument, expected, got."""

from __future__ import annotations

from itertools import pairwise
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor


def check_is_tensor(function: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":  # its module is torch's to import
        raise TypeError(
            f"{function}: {argument} must be a plain tensor, got a DTensor; pass this rank's part,"
            " its to_local()"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{function}: {argument} must be a dense tensor, got {value.layout}")


def check_is_number(function: str, argument: str, value: object) -> None:
    """A tensor is refused too: its gradient would be lost."""
    if not isinstance(value, (float, int, Real)):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")


def check_is_integer(function: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: {argument} must be an integer, got {type(value).__name__}")


def check_is_positive(function: str, argument: str, value: object) -> None:
    """An integer of at least 1."""
    check_is_integer(function, argument, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{function}: {argument} must be at least 1, got {value}")


def check_layer_sizes(layer: str, input_size: int, hidden_size: int, num_heads: int) -> None:
    check_is_positive(layer, "input_size", input_size)
    check_is_positive(layer, "hidden_size", hidden_size)
    check_is_positive(layer, "num_heads", num_heads)
    if hidden_size % num_heads:
        raise ValueError(
            f"{layer}: hidden_size must be a multiple of num_heads = {num_heads}, got {hidden_size}"
        )


def check_tensor(
    function: str,
    argument: str,
    tensor: Tensor,
    letters: str,
    shape: tuple[int, ...],
    first: tuple[str, Tensor],
) -> None:
    """A floating point tensor of `shape` (in `letters`), on the device of the `first` argument."""
    check_is_tensor(function, argument, tensor)
    if tensor.shape != shape:
        raise ValueError(
            f"{function}: {argument} must be {letters} = {shape}, got {tuple(tensor.shape)}"
        )
    if not tensor.dtype.is_floating_point:
        raise TypeError(
            f"{function}: {argument} must be a floating point tensor, got {tensor.dtype}"
        )
    name, like = first
    if tensor.device != like.device:
        raise ValueError(
            f"{function}: {argument} must be on {name}'s device {like.device}, got {tensor.device}"
        )


def count_sequences(function: str, first: tuple[str, Tensor], cu_seqlens: Tensor | None) -> int:
    """Sequences in the `first` argument (B, T, ...); reads no values of `cu_seqlens`."""
    name, like = first
    if cu_seqlens is None:
        return like.shape[0]
    check_is_tensor(function, "cu_seqlens", cu_seqlens)
    if like.shape[0] != 1:
        raise ValueError(
            f"{function}: {name} must have B = 1 with cu_seqlens, got B = {like.shape[0]}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{function}: cu_seqlens must be (S + 1,) int32, got {tuple(cu_seqlens.shape)}"
            f" {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != like.device:
        raise ValueError(
            f"{function}: cu_seqlens must be on {name}'s device {like.device},"
            f" got {cu_seqlens.device}"
        )
    return cu_seqlens.shape[0] - 1


def token_starts(function: str, cu_seqlens: Tensor, T: int) -> list[int]:
    """The values of `cu_seqlens`, checked: loops and kernels index with them."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != T or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"{function}: cu_seqlens must rise from 0 to T = {T}, got {starts}")
    return starts


def check_process_group(function: str, argument: str, group: object) -> None:
    """A group that this process is in; None is the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{function}: torch.distributed must be initialised, which `init_process_group` does,"
            " got a process without a default group"
        )
    outside = dist.GroupMember.NON_GROUP_MEMBER  # what new_group returns there
    if not (group is None or isinstance(group, dist.ProcessGroup) or group == outside):
        raise TypeError(
            f"{function}: {argument} must be a ProcessGroup, got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:  # type: ignore[arg-type]  # what it is was seen to
        raise RuntimeError(
            f"{function}: {argument} must hold this rank,"
            f" got a group without rank {dist.get_rank()}"
        )
