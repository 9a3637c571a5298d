"""The machine and the versions behind a measurement."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GENERATED = (":!benchmarks/results", ":!README.md")  # written by the benchmarks themselves


@dataclass(frozen=True)
class Machine:
    """`isa` is the instruction set of our CPU kernels; `load` the processes that were running or
    waiting, averaged over the minute before, so that a number from a busy machine can be told."""

    device: str
    name: str
    threads: int
    isa: str
    torch: str
    python: str
    commit: str
    dirty: bool
    load: float

    @property
    def folder(self) -> str:
        """The name as a folder: "Intel(R) Xeon(R) Processor" is intel-xeon-processor."""
        plain = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*$", " ", self.name.lower())
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def describe(gpu: str | None = None) -> Machine:
    """This machine, by its CPU or by its GPU's name."""
    return Machine(
        device="GPU" if gpu else "CPU",
        name=gpu or _cpu_name(),
        threads=torch.get_num_threads(),
        isa=_instruction_set(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", *GENERATED)),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_set() -> str:
    """As the package itself reports it."""
    command = [sys.executable, "-m", "xlstm_kernels", "--json"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return json.loads(answer.stdout)["_cpu"].get("instruction_set", "none")
    except (json.JSONDecodeError, KeyError):
        return "unknown"


def _git(*arguments: str) -> str:
    """What git says, or "" outside a checkout."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()
