"""How the mLSTM's Triton kernels are launched: the sizes of blocks, by shape, dtype and chip.

Chosen from what the compiler reports of the compiled kernels, to which
tests/test_mlstm_triton_compile.py holds them, and not by timing in the user's process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...arguments import token_starts
from ...memory import triton_target
from .shapes import STATE_INTERVAL, sequences

# A kernel's tensors and numbers, and its constants by name.
Args = tuple[Any, ...]
Flags = dict[str, Any]
# Programs that keep a GPU busy: where walks over the sequences are fewer, intervals are walked side
# by side. A constant, so that results do not depend on the GPU.
BUSY_PROGRAMS = 256


@dataclass(frozen=True)
class Blocks:
    """One kernel's launch: columns of keys and of values in a block, the compiler's options, and
    rows or columns of a state that a product with it takes at once."""

    k: int
    v: int
    warps: int = 4
    stages: int = 2
    c: int = 64

    def count(self, K: int, V: int) -> int:
        """Blocks of a (K, V) matrix."""
        return -(-K // self.k) * -(-V // self.v)


@dataclass(frozen=True)
class Launch:
    """All kernels' launches for one shape, dtype and chip.

    tile: tokens of a tile, for all of them. dot: precision of products, as in triton_tiles.py.
    """

    tile: int
    dot: str
    states: Blocks
    outputs: Blocks
    queries: Blocks
    dstates: Blocks
    keys: Blocks
    scan: Blocks
    gates: Blocks

    def key_flags(self, K: int, V: int) -> list[dict[str, bool]]:
        """dk and dv in one launch where one block holds each."""
        if self.keys.count(K, V) == 1:
            return [{"DK": True, "DV": True}]
        return [{"DK": True, "DV": False}, {"DK": False, "DV": True}]


# By chip: states and their gradients; outputs; dq, dk and dv. Registers decide: more would spill,
# and so would fewer warps. Blocks are cut down to narrower heads.
TABLE = {
    "hopper": (
        Blocks(64, 128, warps=8),
        Blocks(128, 128, warps=4, c=32),
        Blocks(128, 128, warps=8, c=64),
    ),
    "any": (
        Blocks(64, 128, warps=8),
        Blocks(128, 128, warps=8, c=16),
        Blocks(64, 32, warps=8, c=32),
    ),
    # Its warps are twice as wide.
    "hip": (
        Blocks(64, 128, warps=8),
        Blocks(128, 128, warps=8, c=16),
        Blocks(64, 32, warps=4, c=32),
    ),
}
# Products of float32 are sums of the threads, operands in their registers.
FLOAT32 = Blocks(32, 32, warps=4, stages=1, c=16)
INTERPRETED = Blocks(128, 128)


def choose(K: int, V: int, dtype: torch.dtype, chunk_size: int, chip: str) -> Launch:
    """chunk_size 0 leaves the choice of the tile to the table; chip: as chip_of() says."""
    interpreted = chip == "interpreter"
    if dtype == torch.bfloat16:
        dot = "bf16_emulated" if interpreted else "bf16"
    else:
        # float16 has too few exponents for the products' other operand; tf32 has its digits.
        dot = "tf32" if dtype == torch.float16 and not interpreted else "ieee"
    if interpreted:
        states = outputs = grads = INTERPRETED
    elif dot == "bf16":
        states, outputs, grads = TABLE.get(chip, TABLE["any"])
    else:
        states = outputs = grads = FLOAT32
    tile = 64 if interpreted or dot == "bf16" else 32
    while tile > 16 and 0 < chunk_size < tile:
        tile //= 2

    def fit(blocks: Blocks) -> Blocks:
        k, v = block(K, blocks.k), block(V, blocks.v)
        return replace(blocks, k=k, v=v, c=min(blocks.c, max(k, v)))

    if masked := dot == "bf16" and K & (K - 1) != 0:  # masks of odd widths take registers
        outputs, grads = (replace(blocks, k=blocks.k // 2) for blocks in (outputs, grads))
    scan = Blocks(block(K, 32), block(V, 64))
    walks, queries, keys = fit(states), fit(grads), fit(grads)
    if chip != "hopper":  # and so does what is read ahead, of which there is none in one block
        one = keys.count(K, V) == 1
        queries = replace(queries, stages=1 if one or masked else queries.stages)
        keys = replace(keys, stages=1 if one else keys.stages)
    gates = Blocks(16, 16, stages=1)
    return Launch(tile, dot, walks, fit(outputs), queries, walks, keys, scan, gates)


def chip_of(tensor: Tensor, interpreted: bool) -> str:
    """A key of TABLE, or a name that it lacks."""
    if interpreted:
        return "interpreter"
    target = triton_target(tensor)
    if target.backend == "hip":
        return "hip"
    return "hopper" if target.arch == 90 else "any"


def block(width: int, largest: int) -> int:
    """The smallest power of two that holds `width`, between 16, which products need, and
    `largest`."""
    size = 16
    while size < min(width, largest):
        size *= 2
    return size


class Call:
    """What all kernels are told of the call."""

    def __init__(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        i_BTH: Tensor,
        f_BTH: Tensor,
        cu_seqlens: Tensor | None,
        chunk_size: int,
        interpreted: bool,
    ):
        from .triton_tiles import GateRows, Packing, Sizes

        B, T, self.H, self.K = q_BTHK.shape
        self.V = v_BTHV.shape[3]
        self.device = q_BTHK.device
        chip = chip_of(q_BTHK, interpreted)
        self.launch = choose(self.K, self.V, q_BTHK.dtype, chunk_size, chip)
        self.q, self.k, self.v = (self.rows(rows_together(x)) for x in (q_BTHK, k_BTHK, v_BTHV))
        self.gates = GateRows(i_BTH, f_BTH, *i_BTH.stride(), *f_BTH.stride())
        self.sequences = sequences(q_BTHK, cu_seqlens)
        tile = self.launch.tile
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            slots, self.intervals = (B * -(-T // span) for span in (tile, STATE_INTERVAL))
            self.packing = Packing(self.gates.i, self.gates.i, self.gates.i)
        else:
            slots, self.intervals = (T // s + self.sequences for s in (tile, STATE_INTERVAL))
            if cu_seqlens.device.type == "cpu":
                token_starts("mlstm", cu_seqlens, T)
            # On a GPU the values stay unread here; clamped, they lead to no other memory.
            starts = cu_seqlens.clamp(0, T)
            owners = (_owners(starts, tile, slots), _owners(starts, STATE_INTERVAL, self.intervals))
            self.packing = Packing(starts, *owners)
        self.sizes = Sizes(T, B * T, slots, self.H)

    def rows(self, x_BTHD: Tensor) -> Any:
        from .triton_tiles import Rows

        return Rows(x_BTHD, *x_BTHD.stride()[:3])

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def scratch(self, count: int, size: int) -> Tensor:
        """Rows with room for (H, size), all at multiples of 16 bytes: Triton compiles a kernel anew
        for an address that is none."""
        return self.empty(count, -(-self.H * size // 4) * 4)

    def on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def split(self, blocks: Blocks) -> bool:
        """Whether walks over whole sequences are too few: the intervals then go side by side."""
        walks = self.sequences * self.H * blocks.count(self.K, self.V)
        return walks < BUSY_PROGRAMS and self.intervals > self.sequences

    def walk(self, kernel: Any, blocks: Blocks, split: bool, args: Args, flags: Flags) -> None:
        """A program for each block of the state of each head and sequence or, split, interval."""
        walks = self.intervals if split else self.sequences
        grid = (walks * blocks.count(self.K, self.V), self.H)
        self._run(kernel, grid, blocks, args, flags | self._widths(blocks))

    def each_tile(
        self, kernel: Any, blocks: Blocks, over: str | None, args: Args, flags: Flags
    ) -> None:
        """A program for each tile of each head and, `over` them, each block of keys or values."""
        counts = {None: 1, "keys": -(-self.K // blocks.k), "values": -(-self.V // blocks.v)}
        widths = {} if over is None else self._widths(blocks) | {"BLOCK_C": blocks.c}
        self._run(kernel, (self.sizes.slots, self.H, counts[over]), blocks, args, flags | widths)

    def _widths(self, blocks: Blocks) -> Flags:
        return {"K": self.K, "V": self.V, "BLOCK_K": blocks.k, "BLOCK_V": blocks.v}

    def _run(
        self, kernel: Any, grid: tuple[int, ...], blocks: Blocks, args: Args, flags: Flags
    ) -> None:
        if 0 in grid:
            return
        tile = self.launch.tile
        flags = flags | {"TILE": tile, "PER": STATE_INTERVAL // tile, "PACKED": self.packed}
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        kernel[grid](*args, packing=self.packing, **self.sizes._asdict(), **flags, **options)


def _owners(starts: Tensor, span: int, slots: int) -> Tensor:
    """Of each slot of `span` tokens its sequence, as shapes.py numbers them."""
    places = torch.arange(max(slots, len(starts)), dtype=torch.int32, device=starts.device)
    first = starts[:-1] // span + places[: len(starts) - 1]
    owners = torch.searchsorted(first, places[:slots], right=True, out_int32=True) - 1
    return owners.clamp_(min=0)


def rows_together(tensor: Tensor) -> Tensor:
    """With neighbours in the last axis side by side, which one load takes together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
