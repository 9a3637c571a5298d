"""How the recurrence is launched on CUDA: one value from one function, of the shape and the chip.

A head of up to 128 units is one block's, which keeps its R in registers and shared memory, and no
block waits for another. A wider one, or one whose R the chip's shared memory is too small for, is
dealt to a team of blocks, which tell each other h at every step (csrc/cuda/recurrence_team.h). A
team may be a cluster where the chip has clusters and one of up to 16 blocks holds R, which is so up
to 512 units. (Of 768, in bfloat16, a block of 16 has 295 KB of R. Eight warps keep 131 KB in their
registers, and reading the others from shared memory takes 0.7 us a step, 2.3 us in all where a team
takes 1.9; nor can 48 units be dealt evenly to eight warps of 8.) Of all those teams the one is
launched that `step_us` predicts to be fastest. Where not all teams fit on the chip, each takes one
head and tile of sequences after the other. The cell does not matter: each has four gates, and its
states are in registers.
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
CLUSTER = 16  # blocks at most; a cluster's multiprocessors are of one group of so many
BARRIER_BYTES = 16  # of a block of a cluster
# The model, in cycles of 1.8 GHz: latencies and rates of a Hopper multiprocessor. Of the exchange
# through L2: a store, a flag, a load and the wait for the slowest block; of a cluster's: a store,
# its barrier and that wait. Between shared memories, arXiv 2402.13499 measured 3.3 TB/s on 114
# multiprocessors, and 180 cycles.
CLOCK_GHZ = 1.8
MMA_LATENCY, MMA_ISSUE = 33, 6  # of one product; between two of one tensor core
POINTWISE_LATENCY = {"slstm": 220, "lstm": 140}
SFU_PER_UNIT = {"slstm": 6, "lstm": 5}
ALU_PER_UNIT = {"slstm": 45, "lstm": 30}
SFU_RATE, ALU_RATE = 16, 128  # a cycle
SHARED_RATE, L2_RATE, CLUSTER_RATE = 128, 64, 16  # bytes a cycle
BARRIER, EXCHANGE, CLUSTER_EXCHANGE = 60, 1620, 400
BACKWARD_POINTWISE = 1.6  # recomputed, and differentiated


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
    deals = _teams(way, D, operand, items, chip)
    return min(deals, key=lambda deal: (step_us(way, deal, operand, "slstm"), deal.parts))


def step_us(way: Direction, launch: Launch, operand: torch.dtype, function: str) -> float:
    """Predicted, not measured: latencies and rates along the longest path of a step of all heads
    and sequences."""
    per_word = 4 // operand.itemsize
    chained = 1 if per_word == 2 else 3  # products that wait for one another
    at_once = 2 if per_word == 2 else 3  # of one fragment
    width = launch.units * launch.parts * way.per_unit
    products = launch.tiles or _ceil_div(width, 8 * per_word)
    row_tiles = TEAM_ROW_TILES if launch.is_team else way.row_tiles
    warps = launch.threads // 32
    mma = max(
        products * (MMA_LATENCY if chained == 1 else 4) + (chained - 1) * MMA_LATENCY,
        products * row_tiles * at_once * max(1, warps / 4) * MMA_ISSUE,
    )
    units = launch.units * COLUMNS
    pointwise = POINTWISE_LATENCY[function] + units * (
        SFU_PER_UNIT[function] / SFU_RATE + ALU_PER_UNIT[function] / ALU_RATE
    )
    if way is BACKWARD:
        pointwise *= BACKWARD_POINTWISE
    operands = warps * products * 32 * 8 * per_word
    if launch.is_team:
        shared_read, exchange = _exchange(way, launch, operands)
    else:
        of_block = 4 * COLUMNS * width
        shared_read, exchange = launch.shared_bytes - 2 * of_block + warps * of_block, 0.0
    cycles = max(mma, shared_read / SHARED_RATE) + pointwise + BARRIER + exchange
    return launch.rounds * cycles / CLOCK_GHZ / 1e3


def _exchange(way: Direction, launch: Launch, operands: int) -> tuple[int, float]:
    """Bytes that a team's block reads from its shared memory at each step, and the cycles that its
    exchange takes; `operands`: bytes of all warps' right operands."""
    own = way is BACKWARD or launch.is_cluster  # they are in shared memory
    shared_read = launch.threads * FRAGMENT_BYTES * launch.near + (operands if own else 0)
    exchanged = 4 * COLUMNS * launch.units * launch.parts
    if launch.is_cluster:
        return shared_read, BARRIER + CLUSTER_EXCHANGE + exchanged / CLUSTER_RATE
    read = (exchanged if own else operands) + launch.threads * FRAGMENT_BYTES * launch.far
    return shared_read, BARRIER + EXCHANGE + read / L2_RATE


def _teams(
    way: Direction, D: int, operand: torch.dtype, items: int, chip: Chip
) -> Iterator[Launch]:
    for units in TEAM_UNITS:
        parts = _ceil_div(D, units)
        if parts > chip.multiprocessors:
            continue
        tiles = _products(way, units, parts, operand)
        for cluster in (True, False):
            teams = min(items, _at_once(parts, cluster, chip))
            if teams == 0:
                continue
            spare = max(0, tiles * TEAM_ROW_TILES - HELD[operand][cluster])
            own = own_bytes(way, units)
            slot_words = _slot_words(way, units, parts, tiles, operand, cluster)
            if cluster:
                own += 2 * 4 * slot_words + BARRIER_BYTES
            near = min(spare, max(0, chip.shared_bytes - own) // (FRAGMENT_BYTES * TEAM_THREADS))
            deal = Launch(
                units,
                parts,
                teams,
                rounds=_ceil_div(items, teams),
                threads=TEAM_THREADS,
                shared_bytes=own + FRAGMENT_BYTES * TEAM_THREADS * near,
                tiles=tiles,
                near=near,
                far=spare - near,
                slot_words=slot_words,
                is_cluster=cluster,
            )
            fits = deal.far == 0 and deal.shared_bytes <= chip.shared_bytes
            if not cluster or fits:
                yield deal


def _at_once(parts: int, cluster: bool, chip: Chip) -> int:
    """Teams that the chip's multiprocessors hold; 0: none of that kind."""
    if not cluster:
        return chip.multiprocessors // parts
    if parts == 1 or not chip.has_clusters:
        return 0
    groups = max(1, chip.multiprocessors // CLUSTER)
    return groups * (min(CLUSTER, chip.multiprocessors) // parts)


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
