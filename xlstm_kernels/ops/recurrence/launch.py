"""How the recurrence is launched on CUDA: one value from one function, of the shape and the chip.

A head of up to 128 units is one block's, which keeps its R in registers and shared memory, and no
block waits for another. A wider one, or one whose R the chip's shared memory is too small for, is
dealt to a team of blocks, which tell each other h at every step (csrc/cuda/recurrence_team.h). A
team is a cluster where the chip has clusters and one of up to 16 blocks holds R. Where not all
teams fit on the chip, each takes one head and tile of sequences after the other. The cell does not
matter: each has four gates, and its states are in registers.
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
# Fragments of R that a thread of a team has in registers: of any, of a cluster's.
HELD = {torch.float32: (16, 24), torch.bfloat16: (16, 32)}
FETCHED = 4  # products whose operands a warp of a team asks for at a time
TEAM_ROW_TILES = 2  # of 16 rows, that a warp of a team multiplies at a time
FRAGMENT_BYTES = 16
CLUSTER = 16  # blocks at most
BARRIER_BYTES = 16  # of a block of a cluster


class Direction(NamedTuple):
    """The products of a warp that has all of a sum: its units, and tiles of 16 rows; how many
    elements a unit gives to a product."""

    units: int
    row_tiles: int
    per_unit: int


FORWARD, BACKWARD = Direction(8, 2, 1), Direction(16, 1, 4)


class Chip(NamedTuple):
    capability: str
    multiprocessors: int
    shared_bytes: int  # that a block may have

    @property
    def has_clusters(self) -> bool:
        """Of 16 blocks. Chips of 12.x have smaller ones, and shared memory for less."""
        return self.capability.split(".")[0] in ("9", "10")


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
    # Of a team: products of a warp, fragments of R of a thread in shared and in global memory,
    # words of a slot of the exchange, and whether that is in the shared memory of a cluster.
    tiles: int = 0
    near: int = 0
    far: int = 0
    slot_words: int = 0
    is_cluster: bool = False

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


# One step without a gradient, csrc/cuda/recurrence_step.cu, which asks for nothing.
STEP = Launch(units=4, parts=1, teams=0, rounds=1, threads=128, shared_bytes=0)


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
    deals = list(_teams(way, D, operand, items, chip))
    if clusters := [deal for deal in deals if deal.is_cluster]:
        return min(clusters, key=lambda deal: (deal.rounds, deal.parts))
    return min(deals, key=lambda deal: (deal.rounds, deal.units))


def _teams(
    way: Direction, D: int, operand: torch.dtype, items: int, chip: Chip
) -> Iterator[Launch]:
    for units in TEAM_UNITS:
        parts = _ceil_div(D, units)
        if parts > chip.multiprocessors:
            continue
        teams = min(items, chip.multiprocessors // parts)
        tiles = _products(way, units, parts, operand)
        for cluster in (True, False):
            spare = max(0, tiles * TEAM_ROW_TILES - HELD[operand][cluster])
            own = own_bytes(way, units)
            slot_words = _slot_words(way, units, parts, tiles, operand, cluster)
            if cluster:
                own += 2 * 4 * slot_words + BARRIER_BYTES
            near = min(spare, max(0, chip.shared_bytes - own) // (FRAGMENT_BYTES * TEAM_THREADS))
            deal = Launch(
                *(units, parts, teams, _ceil_div(items, teams), TEAM_THREADS),
                shared_bytes=own + FRAGMENT_BYTES * TEAM_THREADS * near,
                tiles=tiles,
                near=near,
                far=spare - near,
                slot_words=slot_words,
                is_cluster=cluster,
            )
            fits = deal.far == 0 and deal.shared_bytes <= chip.shared_bytes
            if not cluster or (chip.has_clusters and 1 < parts <= CLUSTER and fits):
                yield deal


def own_bytes(way: Direction, units: int) -> int:
    """What a block of a team has in shared memory beside R: the sums of its slices, or its gates'
    gradients of this step and the next."""
    if way is FORWARD:
        return 4 * 4 * TEAM_ROW_TILES * TEAM_THREADS
    return 2 * 4 * 4 * COLUMNS * units


def _products(way: Direction, units: int, parts: int, operand: torch.dtype) -> int:
    """Of a warp of a team."""
    depth = 8 * 4 // operand.itemsize
    if way is FORWARD:  # of its slice of the sum
        slices = TEAM_WARPS * way.units // units
        return _ceil_div(_ceil_div(parts * units, depth), slices * FETCHED) * FETCHED
    # Of the block's gates, for the units of the head that are the warp's.
    rows = _ceil_div(parts * units, 16 * TEAM_ROW_TILES * TEAM_WARPS)
    return rows * units * way.per_unit // depth


def _slot_words(
    way: Direction, units: int, parts: int, tiles: int, operand: torch.dtype, cluster: bool
) -> int:
    """The operands of all slices, or what each block gives of the sums of each."""
    if way is FORWARD:
        return TEAM_WARPS * way.units // units * tiles * 32 * 2 * 4 // operand.itemsize
    return (1 if cluster else parts) * parts * units * COLUMNS


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
