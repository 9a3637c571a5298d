"""How the recurrence is launched on CUDA: one value from one function, of the shape and the chip.

A head of up to 128 units is one block's, which keeps its R in registers and shared memory, and no
block waits for another. A wider one, or one whose R the chip's shared memory is too small for, is
dealt to a team of blocks, which tell each other h at every step (csrc/cuda/recurrence_team.h).
Where not all teams fit on the chip, each takes one head and tile of sequences after the other. The
cell does not matter: each has four gates, and its states are in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

COLUMNS = 8  # sequences of a tile
# Shared memory of a block that has a head of up to so many units, forward and backward. A test
# holds this and what follows to csrc/cuda/recurrence.h and recurrence_team.h.
BLOCK_BYTES = {
    torch.float32: {32: (2304, 10496), 64: (4352, 24832), 128: (221440, 221440)},
    torch.bfloat16: {32: (2560, 8704), 64: (4608, 16896), 128: (74240, 66048)},
}
TEAM_WARPS = 8
TEAM_THREADS = 32 * TEAM_WARPS
TEAM_UNITS = (16, 32)  # of a head, in a block of a team
HELD = 16  # fragments of R that a thread of a team has in registers
FETCHED = 4  # products whose operands a warp of a team asks for at a time
FRAGMENT_BYTES = 16


class Direction(NamedTuple):
    """A warp's products: their units, tiles of 16 rows, and elements that a unit gives to one."""

    units: int
    row_tiles: int
    per_unit: int

    @property
    def sums_bytes(self) -> int:
        """The sums of a team's block, on their way from slice to slice."""
        return 4 * 4 * self.row_tiles * TEAM_THREADS


FORWARD, BACKWARD = Direction(8, 2, 1), Direction(16, 1, 4)


class Chip(NamedTuple):
    capability: str
    multiprocessors: int
    shared_bytes: int  # that a block may have


EMULATED = Chip("9.0", 16, 227 << 10)  # csrc/emulator/machine.h
# To look at, without one at hand. A call asks its device.
CHIPS = {
    chip.capability: chip
    for chip in (
        Chip("8.0", 108, 163 << 10),  # A100
        Chip("8.9", 142, 99 << 10),  # L40S
        Chip("9.0", 132, 227 << 10),  # H100
        Chip("10.0", 148, 227 << 10),  # B200
        Chip("12.0", 170, 99 << 10),  # RTX 5090
    )
}


@dataclass(frozen=True)
class Launch:
    units: int  # of a head, in a block
    parts: int  # blocks of a team; 1: no block waits for another
    teams: int  # at work at a time
    rounds: int  # heads and tiles of sequences that a team takes one after the other
    threads: int
    shared_bytes: int
    # Of a team: products that a warp adds up for each sum, fragments of R of a thread in shared and
    # in global memory, words of a slot of the exchange.
    tiles: int = 0
    near: int = 0
    far: int = 0
    slot_words: int = 0

    @property
    def is_team(self) -> bool:
        return self.tiles > 0

    @property
    def places(self) -> int:
        """For a unit of a sequence each, in a block's scratch."""
        return self.threads if self.is_team else self.units * COLUMNS

    @property
    def blocks(self) -> int:
        return self.teams * self.parts


def widest(chip: Chip) -> int:
    """The most units of a head that `launch_shape` has a launch for."""
    return max(TEAM_UNITS) * chip.multiprocessors


def launch_shape(
    way: Direction, D: int, operand: torch.dtype, B: int, H: int, chip: Chip
) -> Launch:
    """The launch for B sequences of H heads of D units, D at most `widest`; `operand`: what R is
    kept in, float32 or bfloat16."""
    items = _ceil_div(B, COLUMNS) * H
    for width, shared_bytes in BLOCK_BYTES[operand].items():
        if width >= D and max(shared_bytes) <= chip.shared_bytes:
            threads = width // way.units * 32
            return Launch(width, 1, items, 1, threads, shared_bytes[way is BACKWARD])
    return min(
        _teams(way, D, operand, items, chip), key=lambda launch: (launch.rounds, launch.units)
    )


def launch_table(chip: Chip, B: int, H: int | None) -> list[dict[str, str]]:
    """The launches on `chip` for B sequences of H heads, or of as many as have 768 units: cells of
    text by column."""
    rows = []
    for operand, dtypes in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32, float16")):
        for D in (32, 64, 128, 192, 256, 512, 768, 1024, 2048):
            for name, way in (("forward", FORWARD), ("backward", BACKWARD)):
                row = {"r": dtypes, "D": str(D), "": name, "H": str(H or max(1, 768 // D))}
                rows.append(row)
                if widest(chip) < D:
                    row["a head in"] = f"D at most {widest(chip)}"
                    continue
                launch = launch_shape(way, D, operand, B, int(row["H"]), chip)
                row["a head in"] = f"a team of {launch.parts}" if launch.is_team else "one block"
                row["units a block"] = str(launch.units)
                row["blocks"] = f"{launch.blocks} of {launch.threads}"
                row["rounds"] = str(launch.rounds)
                row["shared KiB"] = f"{launch.shared_bytes / 1024:.4g}"
                row["R in L2, KiB a block"] = str(
                    launch.far * launch.threads * FRAGMENT_BYTES // 1024
                )
    return rows


def _teams(
    way: Direction, D: int, operand: torch.dtype, items: int, chip: Chip
) -> Iterator[Launch]:
    per_word = 4 // operand.itemsize
    for units in TEAM_UNITS:
        parts = _ceil_div(D, units)
        if parts > chip.multiprocessors:
            continue
        teams = min(items, chip.multiprocessors // parts)
        slices = TEAM_WARPS // (units // way.units)
        products = _ceil_div(D * way.per_unit, 8 * per_word)
        tiles = _ceil_div(products, slices * FETCHED) * FETCHED
        spare = max(0, tiles * way.row_tiles - HELD)
        room = (chip.shared_bytes - way.sums_bytes) // (FRAGMENT_BYTES * TEAM_THREADS)
        near = min(spare, room)
        yield Launch(
            *(units, parts, teams, _ceil_div(items, teams), TEAM_THREADS),
            shared_bytes=way.sums_bytes + FRAGMENT_BYTES * TEAM_THREADS * near,
            tiles=tiles,
            near=near,
            far=spare - near,
            slot_words=slices * tiles * 32 * 2 * per_word,
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
