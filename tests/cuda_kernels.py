"""What nvcc made of the CUDA kernels, and what a step of the recurrence should take:

    python tests/cuda_kernels.py docs/kernels.md      # `make kernels`

writes the tables. Registers, spills and instructions are read from the extension with cuobjdump;
times are a model's, of a chip that need not be here.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from xlstm_kernels.cells import CELLS
from xlstm_kernels.ops.recurrence.launch import (
    BACKWARD,
    BLOCK_BYTES,
    CHIPS,
    FORWARD,
    Chip,
    Direction,
    Launch,
    launch_shape,
    step_us,
)

# Instructions of SASS, by what they are for. A spill is a store to local memory.
INSTRUCTIONS = {
    "mma": r"[HQ]G?MMA|UTCHMMA",
    "async": r"LDGSTS|UBLKCP|UTMALDG|SYNCS|STAS",
    "prefetch": r"CCTL\S*\.PF2",
    "acquire": r"LD\.?G?\S*\.STRONG\.(?:GPU|SYS)",
    "spills": r"STL",
}
# Registers and threads of a multiprocessor, and shared memory beside what each block may have, KiB.
REGISTERS, THREADS, MAX_BLOCKS = 65536, 2048, 32
SHARED_OF_CHIP_KIB = {"8.0": 164, "9.0": 228, "10.0": 228}


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture. `template`: its arguments, "LSTM, 2, 128"."""

    name: str
    template: str
    arch: str
    registers: int
    stack_bytes: int
    mangled: str
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}<{self.template}> for {self.arch}"

    @property
    def capability(self) -> str:
        digits = self.arch.removeprefix("sm_").rstrip("af")
        return f"{digits[:-1]}.{digits[-1]}"


def extension() -> Path | None:
    found = importlib.util.find_spec("xlstm_kernels._cuda")
    return Path(found.origin) if found and found.origin else None


def cuobjdump() -> str | None:
    """CUDA's own, or Triton's where that is not on PATH."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))


def missing() -> str | None:
    """Why there is nothing to look at, or None."""
    if extension() is None:
        return "xlstm_kernels._cuda is not built: no nvcc"
    return None if cuobjdump() else "there is no cuobjdump on PATH, nor Triton's"


def resources() -> list[Kernel]:
    """All of the extension, of every architecture, without what only SASS says."""
    found = [
        (arch, *row)
        for arch, text in _by_arch(_dump("-res-usage"))
        for row in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)
    ]
    names = _read_names([mangled for _, mangled, _, _ in found])
    return [
        Kernel(*name, arch, int(registers), int(stack), mangled)
        for name, (arch, mangled, registers, stack) in zip(names, found, strict=True)
    ]


def kernels() -> list[Kernel]:
    """All of the extension, of every architecture."""
    counts = {}
    for arch, text in _by_arch(_dump("-sass")):
        for function in re.split(r"\n\s*Function : ", text)[1:]:
            mangled, body = function.split("\n", 1)
            counts[arch, mangled.strip()] = {
                what: len(re.findall(rf"(?m)^\s+/\*\w+\*/\s+(?:@\S+\s+)?(?:{pattern})", body))
                for what, pattern in INSTRUCTIONS.items()
            }
    found = [replace(kernel, counts=counts[kernel.arch, kernel.mangled]) for kernel in resources()]
    return sorted(found, key=lambda kernel: (kernel.name, kernel.template, kernel.arch))


def _dump(what: str) -> str:
    tool, path = cuobjdump(), extension()
    assert tool is not None and path is not None
    # It looks for nvdisasm on PATH.
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    return subprocess.run(
        [tool, what, path], capture_output=True, text=True, check=True, env=environment
    ).stdout


def _by_arch(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"\narch = ", text)[1:]:
        arch, rest = part.split("\n", 1)
        yield arch.strip(), rest


def _read_names(mangled: list[str]) -> list[tuple[str, str]]:
    """("recurrence_forward", "LSTM, 2, 128") of each."""
    plain = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    names = []
    for line in plain.splitlines():
        line = re.sub(r"xlstm::|\(anonymous namespace\)::|generic::|\((?:int|bool)\)", "", line)
        match = re.match(r"(?:void )?(\w+?)(?:_kernel)?(?:<(.*)>)?\(", line)
        assert match, line
        names.append((match[1], match[2] or ""))
    return names


@dataclass(frozen=True)
class Step:
    """One step of a launch: what it computes and moves, and what the model says it takes."""

    gflop: float
    moved_bytes: int  # to and from global memory but for the exchange, with what a gradient needs
    blocks_per_sm: int
    time_us: float


CELL_TYPES = {"slstm": "SLSTM<false>", "lstm": "LSTM"}  # csrc/cells/list.h


def predict(
    way: Direction,
    cell: str,
    D: int,
    operand: torch.dtype,
    B: int,
    H: int,
    chip: Chip,
    registers: int,
) -> Step:
    """A step of the launch for B sequences of H heads."""
    launch = launch_shape(way, D, operand, B, H, chip)
    states = CELLS[cell].states
    element = operand.itemsize
    per_unit = (
        element * 5 + 16 + 4 * states / 16
        if way is FORWARD
        else element * 6 + 32 + 4 * states / 16 + 8 * (states - 1)
    )
    return Step(
        2e-9 * 4 * D * D * H * B,
        round(per_unit * D * H * B),
        min(
            REGISTERS // (-(-registers // 8) * 8 * launch.threads),
            THREADS // launch.threads,
            (SHARED_OF_CHIP_KIB[chip.capability] << 10) // (launch.shared_bytes + 1024),
            MAX_BLOCKS,
        ),
        step_us(way, launch, operand, CELLS[cell].function),
    )


INTRODUCTION = """# CUDA kernels, as compiled

Written by `make kernels`: do not edit. Registers and bytes of stack of a thread (stack is what
spills) and numbers of instructions, as nvcc {nvcc} left them in `xlstm_kernels._cuda`. `mma`:
matrix products on tensor cores; `async`: copies that a thread does not wait for, and their barriers
(template argument `true` of a team: it is a cluster, which sm_80 has not); `prefetch`: memory that
is asked for steps before it is read; `acquire`: reads of another block's flag; `spills`: stores to
the stack. `tests/test_cuda_kernels.py` holds them to budgets.
"""
MODEL = """
## What a step of the recurrence should take

B = 16, H = max(1, 768 / D), on an H100 (132 multiprocessors). **Predicted, not measured**:
latencies and rates of one multiprocessor, in `xlstm_kernels/ops/recurrence/launch.py`, added along
the longest path of a step. `moved` is what global memory sees with all that a gradient needs, less
a team's exchange. Heads of more than 128 units are dealt to the cluster or team of blocks that is
predicted to be fastest.
"""


def document(found: list[Kernel]) -> str:
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", nvcc)
    text = [INTRODUCTION.format(nvcc=release[1] if release else "")]
    archs = sorted({kernel.arch for kernel in found}, key=lambda arch: int(arch[3:].rstrip("af")))
    columns = ["registers", "stack", *INSTRUCTIONS]
    for arch in archs:
        rows = [
            [f"`{k.name}`", k.template, k.registers, k.stack_bytes, *k.counts.values()]
            for k in found
            if k.arch == arch
        ]
        text += [f"\n## {arch}\n", *markdown(["kernel", "template", *columns], rows)]
    text += [MODEL, *markdown(*predictions(found))]
    return "\n".join(text) + "\n"


def predictions(found: list[Kernel]) -> tuple[list[str], list[list[object]]]:
    """Header and rows: of each direction, cell, operand and width."""
    chip, rows = CHIPS["9.0"], []
    for name, way in (("forward", FORWARD), ("backward", BACKWARD)):
        for cell in ("slstm", "lstm"):
            for operand in BLOCK_BYTES:
                for D in (32, 64, 128, 256, 512, 768, 1024):
                    H = max(1, 768 // D)
                    launch = launch_shape(way, D, operand, 16, H, chip)
                    kernel = _kernel(name, cell, operand, launch)
                    registers = next(
                        k.registers
                        for k in found
                        if k.capability == chip.capability and (k.name, k.template) == kernel
                    )
                    step = predict(way, cell, D, operand, 16, H, chip, registers)
                    rows.append(
                        [
                            *(name, cell, str(operand).removeprefix("torch."), D, H),
                            *(f"{launch.blocks} x {launch.threads}", launch.shared_bytes),
                            *(step.blocks_per_sm, f"{1e3 * step.gflop:.3g}", step.moved_bytes),
                            f"{step.time_us:.2f}",
                        ]
                    )
    header = ["direction", "cell", "r", "D", "H", "blocks x threads", "shared bytes"]
    header += ["blocks an SM", "Mflop", "moved bytes", "us a step, predicted"]
    return header, rows


def _kernel(direction: str, cell: str, operand: torch.dtype, launch: Launch) -> tuple[str, str]:
    """Name and template of the kernel that is launched."""
    last = str(launch.is_cluster).lower() if launch.is_team else str(launch.units)
    template = (CELL_TYPES[cell], str(4 // operand.itemsize), last)
    return f"recurrence_{'team_' * launch.is_team}{direction}", ", ".join(template)


def markdown(header: list[str], rows: list[list[object]]) -> list[str]:
    return [
        "| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    if why := missing():
        print(f"kernels: skipped, {file} stays as it is: {why}", file=sys.stderr)
        return 0
    found = kernels()
    file.write_text(document(found))
    spilled = [kernel for kernel in found if kernel.stack_bytes]
    print(f"{file}: {len(found)} kernels, {len(spilled)} of them spill")
    return 0


if __name__ == "__main__":
    sys.exit(main())
