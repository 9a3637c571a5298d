"""The launches of the recurrence on a chip, which need not be here, as text to look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import launch, triton_launch
from .launch import BACKWARD, COLUMNS, FORWARD, STEP, Chip

WIDTHS = (32, 64, 128, 192, 256, 512, 768, 1024, 2048)
Row = dict[str, str]


def launch_table(chip: Chip, B: int, H: int | None) -> list[Row]:
    """Launches for B sequences of H heads, or of as many as have 768 units, by column: of many
    steps, of their gradient, and of one step without one."""
    rows = []
    for backend, deals in (("cuda", _on_cuda), ("triton", _on_triton)):
        for D in WIDTHS:
            heads = H or max(1, 768 // D)
            for r, way, deal in deals(chip, D, B, heads):
                named = {"backend": backend, "r": r, "D": str(D), "": way, "H": str(heads)}
                rows.append(named | deal)
    return rows


def _on_cuda(chip: Chip, D: int, B: int, H: int) -> Iterator[tuple[str, str, Row]]:
    for operand, r in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32, float16")):
        for name, way in (("forward", FORWARD), ("backward", BACKWARD)):
            if launch.widest(chip) < D:
                yield r, name, {"a head in": f"D at most {launch.widest(chip)}"}
                continue
            deal = launch.launch_shape(way, D, operand, B, H, chip)
            kind = "a cluster" if deal.is_cluster else "a team"
            yield (
                r,
                name,
                {
                    "a head in": f"{kind} of {deal.parts}" if deal.is_team else "one block",
                    "units a block": str(deal.units),
                    "blocks": f"{deal.blocks} of {deal.threads}",
                    "rounds": str(deal.rounds),
                    "shared KiB": f"{deal.shared_bytes / 1024:.4g}",
                    "R in L2, KiB a block": str(
                        deal.far * deal.threads * launch.FRAGMENT_BYTES // 1024
                    ),
                },
            )
    blocks = -(-H * D // STEP.units) * -(-B // COLUMNS)
    yield "any", "step", _step(STEP.units, blocks, STEP.threads, D)


def _on_triton(chip: Chip, D: int, B: int, H: int) -> Iterator[tuple[str, str, Row]]:
    name = "sm_" + chip.capability.replace(".", "")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        r = str(dtype).removeprefix("torch.")
        for way in ("forward", "backward") if D <= triton_launch.WIDEST else ():
            deal = triton_launch.choose(D, dtype, name, way == "backward")
            where = "R kept" if deal.held else "R read in each step"
            yield (
                r,
                way,
                {
                    "a head in": f"one block, {where}",
                    "units a block": str(deal.width),
                    "blocks": f"{H * -(-B // deal.rows)} of {32 * deal.warps}",
                },
            )
    deal = triton_launch.choose_step(D, torch.float32, name)
    blocks = H * -(-B // deal.rows) * -(-D // deal.width)
    yield "any", "step", _step(deal.width, blocks, 32 * deal.warps, D)


def _step(units: int, blocks: int, threads: int, D: int) -> Row:
    return {
        "a head in": f"{-(-D // units)} blocks",
        "units a block": str(units),
        "blocks": f"{blocks} of {threads}",
    }
