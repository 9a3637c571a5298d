"""Says what is installed and what runs here: `python -m xlstm_kernels [--json]`.

Exits with 1 when the CPU kernels do not load. `--launch-table` says instead how the recurrence is
launched on an NVIDIA chip, which need not be here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import __version__, available_backends
from .backends import UNAVAILABLE, Backend, load_cpu, load_cuda
from .ops.recurrence.launch import CHIPS
from .ops.recurrence.launch_table import launch_table


def cpu_report() -> dict[str, Any]:
    """What the CPU extension is and does, or {"why_not": reason}."""
    if UNAVAILABLE[Backend.CPU]:
        return {"why_not": UNAVAILABLE[Backend.CPU]}
    try:
        cpu = load_cpu()
    except (ImportError, ValueError) as error:
        return {"why_not": str(error)}
    return {
        "file": cpu.__file__,
        "compiler": cpu.compiler,
        "sanitizers": cpu.sanitizers or "none",
        "instruction_set": cpu.current_isa(),
        "instruction_sets": cpu.supported_isas(),
        "threads": cpu.num_threads(),
        "thread_pool": "torch" if cpu.has_thread_pool() else "none, torch >= 2.10 has one to share",
    }


def cuda_report() -> dict[str, Any]:
    """What the CUDA extension holds and which devices it sees, or {"why_not": reason}."""
    if UNAVAILABLE[Backend.CUDA]:
        return {"why_not": UNAVAILABLE[Backend.CUDA]}
    try:
        cuda = load_cuda()
    except ImportError as error:
        return {"why_not": str(error)}
    report = {"file": cuda.__file__, "runtime": cuda.runtime_version, "archs": cuda.archs()}
    try:
        report["devices"] = cuda.devices()
    except RuntimeError as error:
        report["no_devices"] = str(error)
    return report


def report() -> dict[str, Any]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "xlstm_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "machine": f"{platform.system()} {platform.machine()}",
        "_cpu": cpu_report(),
        "_cuda": cuda_report(),
        "operations": available_backends(),
    }


def lines(entry: dict[str, Any], indent: str = "") -> list[str]:
    """Names in one column, values in the next; a dict within a dict is an indented block."""
    width = max(len(name) for name in entry)
    text = []
    for name, value in entry.items():
        if isinstance(value, dict):
            text += ["", f"{indent}{name}", *lines(value, indent + "  ")]
            continue
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        text.append(f"{indent}{name:{width}}  {value}")
    return text


def table(rows: list[dict[str, str]]) -> list[str]:
    """Rows of text by column, which are those of the longest row."""
    widest = max(rows, key=len)
    columns = list(widest)
    width = {c: max(len(c), *(len(row.get(c, "")) for row in rows)) for c in columns}
    return [
        "  ".join(f"{row.get(c, ''):{width[c]}}" for c in columns).rstrip()
        for row in [{c: c for c in columns}, *rows]
    ]


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m xlstm_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--launch-table", action="store_true", help="launches of xk.slstm, xk.lstm")
    chip = parser.add_argument_group("with --launch-table")
    chip.add_argument("--capability", choices=CHIPS, default="9.0", help="of the chip (9.0)")
    chip.add_argument("--sms", type=positive, metavar="N", help="its multiprocessors")
    chip.add_argument("--batch", type=positive, metavar="B", default=16, help="sequences (16)")
    chip.add_argument("--heads", type=positive, metavar="H", help="heads (as many as 768 / D)")
    return parser


def main() -> int:
    options = parser().parse_args()
    if options.launch_table:
        chip = CHIPS[options.capability]
        chip = chip._replace(multiprocessors=options.sms or chip.multiprocessors)
        rows = launch_table(chip, options.batch, options.heads)
        print(json.dumps(rows, indent=2) if options.json else "\n".join(table(rows)))
        return 0
    found = report()
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))
    return 1 if "why_not" in found["_cpu"] else 0


if __name__ == "__main__":
    sys.exit(main())
