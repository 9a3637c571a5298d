"""Tensors and buffers as the compiled kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backends import cuda_refuses, load_cpu, load_cuda, triton_refuses

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

# In the order of csrc/common/dtype.h.
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Below this a buffer comes from the allocator's heap, already mapped.
_HUGE_PAGE_BYTES = 2 << 20


def refused_by_cpu(**tensors: Tensor) -> str | None:
    """Why the C++ kernels cannot read the tensors, or None."""
    return _refused(_cpu_refuses, tensors)


def _cpu_refuses(argument: str, device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on CPU tensors, {argument} is on {device}"


def refused_by_cuda(**tensors: Tensor) -> str | None:
    """Why the CUDA kernels cannot read the tensors, or None."""
    return _refused(cuda_refuses, tensors)


def refused_by_triton(**tensors: Tensor) -> str | None:
    """Why the losses' Triton kernels cannot read the tensors, or None."""
    return _refused(triton_refuses, tensors)


def _refused(
    refuses: Callable[[str, torch.device], str | None], tensors: Mapping[str, Tensor]
) -> str | None:
    for name, tensor in tensors.items():
        if why := refuses(name, tensor.device):
            return why
        if tensor.dtype not in CPU_DTYPES:
            return f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
    return None


@contextmanager
def launching(tensor: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """The CUDA kernels for the tensor's device, made current, and torch's stream on it: `_cuda`, or
    the emulator and 0 for a CPU tensor."""
    if tensor.device.type == "cpu":
        yield load_cuda(emulated=True), 0
        return
    with torch.cuda.device(tensor.device):
        yield load_cuda(), torch.cuda.current_stream().cuda_stream


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """The tensor's GPU as the current one, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def triton_target(tensor: Tensor) -> Any:
    """Triton's name of the tensor's GPU, which need not be the current one."""
    from triton.runtime import driver

    with on_device(tensor):
        return driver.active.get_current_target()


def dtype_code(tensor: Tensor) -> int:
    return CPU_DTYPES.index(tensor.dtype)


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def plain(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """Contiguous and of `dtype`; the tensor itself where it is."""
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def dense_rows(tensor: MaybeTensor) -> MaybeTensor:
    """With neighbours in the last axis side by side, which a vector loads at once."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on the CPU, `fresh_cpu`'s."""
    if device.type == "cpu":
        return fresh_cpu(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def fresh_cpu(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor on huge pages where the system grants them: the page faults of a
    large fresh buffer otherwise cost more than the arithmetic that fills it."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= 2 * _HUGE_PAGE_BYTES:
        load_cpu().advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
