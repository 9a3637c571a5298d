"""How the recurrence is launched in Triton: one value from one function, of the shape and the chip.

A chip is "sm_90" and the like, "hip", or "interpreter".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .products import tf32_allowed

WIDEST = 128
# Shared memory that a program may have, KiB; 99 on other NVIDIA chips.
SHARED_KIB = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "hip": 64}


class Launch(NamedTuple):
    """How a program multiplies (triton_tiles.py), its sequences, its units, its warps, and whether
    it holds R, in shared memory or registers: else it reads R in every step, for `depth` terms of
    the sum at a time. `ahead`: steps whose x, or of one step parts of R, that are loaded before
    they are needed. `registers`: that a thread may have, where ptxas would stop at 128, with which
    two programs fit, and spill."""

    dot: str
    rows: int
    width: int
    warps: int
    held: bool
    ahead: int
    depth: int = 16
    registers: int | None = None


def operands(r_dtype: torch.dtype, chip: str) -> tuple[str, int]:
    """How R multiplies on `chip`, and the sequences that fill the rows of a product."""
    if r_dtype == torch.bfloat16:
        return ("bf16_emulated" if chip == "interpreter" else "bf16"), 8
    if chip == "hip":
        return "ieee", 16
    if r_dtype == torch.float16 or tf32_allowed():
        return "tf32", 8
    return "tf32x2", 8


def choose(D: int, r_dtype: torch.dtype, chip: str, backward: bool) -> Launch:
    """Of a loop over time. chip: as chip_of() says."""
    dot, rows = operands(r_dtype, chip)
    width = max(16, 1 << (D - 1).bit_length())
    r_bytes = 4 * width * width * {"bf16": 2, "tf32x2": 8}.get(dot, 4)
    room = SHARED_KIB.get(chip, 99) * 1024 - r_bytes
    # A warp of 32 has 8 units with all their gates.
    warps, held, ahead = width // 8, room >= 256 * width, min(3, room // (256 * width))
    registers = None
    if chip == "hip":
        warps, held, ahead = width // 16, room >= 0, 3
    elif chip == "interpreter":
        held, ahead = True, 1
    else:  # as many warps, and as far ahead, as spill no register
        if width == WIDEST and (backward or not held):
            warps = warps // 2
        if backward and width == WIDEST:
            ahead = 1
        elif backward and width == 64 and dot != "bf16":
            ahead, registers = min(ahead, 2), 255  # such a matrix leaves no room for two programs
        elif backward and width == 64 and chip.startswith("sm_8"):
            ahead = min(ahead, 2)
    return Launch(dot, rows, width, warps, held, ahead if held else 1, registers=registers)


def choose_step(D: int, r_dtype: torch.dtype, chip: str) -> Launch:
    """Of one step, which takes as long as R takes to come: many programs ask for much of it, and
    float32's accuracy costs nothing."""
    dot, rows = operands(torch.float16 if r_dtype == torch.bfloat16 else r_dtype, chip)
    depth = min(1 << (D - 1).bit_length(), 128) if D > 16 else 16
    return Launch(dot, rows, width=4, warps=4, held=False, ahead=3, depth=depth)
