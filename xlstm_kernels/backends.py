"""Backends: their names, whether they can run here, and the choice between them.

This is the only module that reads environment variables, once, at import:

``XLSTM_CPU_ISA``     forces the CPU kernels' instruction set: ``amx``, ``avx512``, ``avx2`` or
                      ``baseline``.
``TRITON_INTERPRET``  Triton's own: 1 runs its kernels in an interpreter, on CPU tensors too.
``XLSTM_CUDA_EMULATOR``  the file of an extension that runs the CUDA kernels on CPU tensors, for
                      tests (csrc/emulator/README.md); no install holds one.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

FORCED_CPU_ISA = os.environ.get("XLSTM_CPU_ISA") or None
# In the words that Triton takes for yes. Triton reads it when a kernel's module is imported.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")

CUDA_EMULATOR = os.environ.get("XLSTM_CUDA_EMULATOR") or None


class Backend(str, Enum):
    """Where an operation runs. ``auto`` chooses; any other name is an order."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"

    @classmethod
    def parse(cls, op: str, name: str) -> Backend:
        for member in BACKENDS:
            if member.value == name:
                return member
        known = ", ".join(repr(member.value) for member in BACKENDS)
        raise ValueError(f"{op}: backend must be one of {known}, got {name!r}")


# torch.compile walks an enumeration's class itself only from torch 2.13 on.
BACKENDS = tuple(Backend)


def _missing(extension: str, why: str) -> str | None:
    found = importlib.util.find_spec(f"xlstm_kernels.{extension}") is not None
    return None if found else f"xlstm_kernels.{extension} is not built: {why}"


_WITHOUT_NVCC = "nvcc was not found when the package was installed"
# The reason why a backend cannot run anything in this process, or None.
UNAVAILABLE: Mapping[Backend, str | None] = {
    Backend.REFERENCE: None,
    Backend.CPU: _missing("_cpu", "reinstall with `pip install .`, it needs a C++17 compiler"),
    Backend.TRITON: None if importlib.util.find_spec("triton") else "triton is not installed",
    Backend.CUDA: None if CUDA_EMULATOR else _missing("_cuda", _WITHOUT_NVCC),
}


@dataclass(frozen=True)
class Op:
    """One operation and the modules that implement it, in `auto`'s order of preference.

    A backend module has ``supports(*call) -> str | None`` (the reason why not), ``forward`` and
    ``backward``; one that can work over the ranks of a process group has OVER_RANKS = True. It is
    imported here but imports its extension (``_cpu``, ``_cuda``, triton) only when it runs.
    ``reference`` needs no module: plain torch runs every call. `functions` are the public functions
    that end in this operation; None: the one of the same name.
    """

    name: str
    table: Mapping[Backend, ModuleType]
    functions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def resolve(
        self, backend: str, *call: Any, function: str | None = None, over_ranks: bool = False
    ) -> Backend:
        """The backend that runs `call`, over several processes or in one; raises, in the name of
        `function` (the operation where None), when a named one cannot. Plain Python over shapes,
        dtypes and devices, so that torch.compile folds it."""
        if backend == "reference":
            return Backend.REFERENCE
        transformed = _transformed()
        if backend == "auto":
            if transformed:
                return Backend.REFERENCE
            for candidate, module in self.table.items():
                if UNAVAILABLE[candidate] is None and _refusal(module, call, over_ranks) is None:
                    return candidate
            return Backend.REFERENCE
        function = function or self.name
        named = Backend.parse(function, backend)
        why = self.why_not(named)
        if why is None and transformed:
            why = "torch.func and forward-mode derivatives need backend='reference'"
        if why is None:
            why = _refusal(self.table[named], call, over_ranks)
        if why is not None:
            raise NotImplementedError(
                f"{function}: backend {backend!r} cannot run this call: {why}"
            )
        return named

    def module(self, backend: str) -> ModuleType:
        return self.table[Backend(backend)]

    def why_not(self, backend: Backend) -> str | None:
        """Why `backend` can run no call of this operation here, or None."""
        if backend is Backend.REFERENCE:
            return None
        if backend not in self.table:
            return f"it has no {backend.value} backend"
        return UNAVAILABLE[backend]


def _refusal(module: ModuleType, call: tuple[Any, ...], over_ranks: bool) -> str | None:
    if over_ranks and not getattr(module, "OVER_RANKS", False):
        return "it takes no process_group"
    return module.supports(*call)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks into the call. A compiled backend
    has no rules for them, and without one a tangent counts as zero."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


# Every operation by name, in the order of definition. Importing xlstm_kernels defines them all.
OPS: dict[str, Op] = {}


def available_backends() -> dict[str, dict[str, str]]:
    """For each public function and each backend "ok", or why it can run nothing here.

    Loads the extensions, so one that is built but does not load, or finds no device, is named too.

    Example:
        >>> import xlstm_kernels as xk
        >>> xk.available_backends()["slstm"]["cpu"]
        'ok'
    """
    broken = {
        Backend.CPU: _failure(load_cpu),
        Backend.TRITON: _without_triton_device(),
        Backend.CUDA: _failure(lambda: load_cuda(emulated=CUDA_EMULATOR is not None).devices()),
    }
    return {
        function: {
            backend.value: op.why_not(backend) or broken.get(backend) or "ok"
            for backend in BACKENDS
            if backend is not Backend.AUTO
        }
        for op in OPS.values()
        for function in op.functions or (op.name,)
    }


def triton_refuses(argument: str, device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, which `argument` is on, or None."""
    if device.type == "cuda" or (device.type == "cpu" and TRITON_INTERPRETED):
        return None
    return (
        f"it runs on CUDA and HIP tensors, and on CPU tensors under TRITON_INTERPRET=1;"
        f" {argument} is on {device}"
    )


def cuda_refuses(argument: str, device: torch.device) -> str | None:
    """Why CUDA kernels cannot run on tensors of `device`, which `argument` is on, or None."""
    if device.type == "cuda":
        return _cuda_failure()
    if device.type == "cpu" and CUDA_EMULATOR:
        return None
    return f"it runs on CUDA tensors, {argument} is on {device}"


def _cuda_failure() -> str | None:
    """Why the CUDA kernels run on no device, where torch's may: a driver too old for the runtime
    linked in, say. Asked once."""
    return _ask_cuda()


# torch.compile takes the result for a constant. torch.compiler.assume_constant_result would say so
# as well, and import all of torch._dynamo.
_cuda_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _ask_cuda() -> str | None:
    return _missing("_cuda", _WITHOUT_NVCC) or _failure(lambda: load_cuda().devices())


def _without_triton_device() -> str | None:
    if TRITON_INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"


def _failure(load: Callable[[], object]) -> str | None:
    try:
        load()
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)
    return None


_cpu: ModuleType | None = None
_emulated: ModuleType | None = None


def load_cpu() -> ModuleType:
    """`xlstm_kernels._cpu`, connected to torch's thread pool, on the instruction set asked for."""
    global _cpu
    if _cpu is None:
        extension = importlib.import_module("xlstm_kernels._cpu")
        extension.set_thread_pool(
            torch_symbol("torch_parallel_for"), torch_symbol("torch_get_num_threads")
        )
        if FORCED_CPU_ISA is not None:
            try:
                extension.set_isa(FORCED_CPU_ISA)
            except ValueError as error:
                raise ValueError(f"XLSTM_CPU_ISA: {error}") from None
        _cpu = extension
    return _cpu


def load_cuda(*, emulated: bool = False) -> ModuleType:
    """`xlstm_kernels._cuda`. It loads without a driver; its functions then raise RuntimeError.
    `emulated`: the same kernels compiled for CPU tensors, from XLSTM_CUDA_EMULATOR."""
    if not emulated:
        return importlib.import_module("xlstm_kernels._cuda")
    global _emulated
    if _emulated is None:
        assert CUDA_EMULATOR is not None
        loader = importlib.machinery.ExtensionFileLoader("xlstm_kernels._emulated", CUDA_EMULATOR)
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        _emulated = importlib.util.module_from_spec(spec)
        loader.exec_module(_emulated)
    return _emulated


def torch_symbol(name: str) -> int:
    """Address of a C function of libtorch_cpu (exported since torch 2.10), 0 if there is none."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        function = getattr(ctypes.CDLL(str(library)), name, None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
