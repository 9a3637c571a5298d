"""The machine and the versions behind a measurement."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import xlstm_kernels as xk
from distill.errors import DistillError

# What the demo's models and their losses are made of.
OPS = ("mlstm", "sliding_window_attention", "linear_kl_div", "linear_cross_entropy")


def describe_machine() -> dict:
    """Processor, threads and versions, as plain values for JSON."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xlstm_kernels": _version("xlstm_kernels"),
    }


def resolve_backend(name: str) -> str:
    """The backend that the demo's operations run on: the fused kernels for "auto", if they can.

    A named backend that cannot run them is refused with the reason.
    """
    available = xk.available_backends()
    wanted = "cpu" if name == "auto" else name
    for op in OPS:
        why = available[op][wanted]
        if why != "ok" and name == "auto":
            return "reference"
        if why != "ok":
            raise DistillError(f"--backend: {name!r} cannot run {op} here: {why}")
    return wanted


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
