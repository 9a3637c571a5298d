"""Sliding-window attention in Triton on CUDA and HIP tensors: check, allocate, launch, return.

Kernels of our own rather than torch's FlexAttention, which has to be compiled in the user's process
and wants a mask of blocks made anew for each batch of packed sequences. No GPU has timed the two
beside each other yet.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backends import TRITON_INTERPRETED, triton_refuses
from .shapes import SPAN, Window, cut

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


def supports(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor) -> str | None:
    if q_BTHD.dtype not in DTYPES:
        return f"q must be float32, bfloat16 or float16, got {q_BTHD.dtype}"
    for name, width in (("D", q_BTHD.shape[3]), ("E", v_BTGE.shape[3])):
        if width > LARGEST_HEAD:
            return f"{name} must be at most {LARGEST_HEAD}, got {width}"
    return triton_refuses("q", q_BTHD.device)


@dataclass(frozen=True)
class Blocks:
    """One kernel's launch: queries and keys it takes at once, and the compiler's options."""

    queries: int
    keys: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """All kernels' launches. dot: the precision of products, as in cells/triton_products.py."""

    dot: str
    forward: Blocks
    queries: Blocks
    keys: Blocks


def choose(D: int, E: int, dtype: torch.dtype, interpreted: bool) -> Launch:
    """From what the compiler reports of the kernels, which tests hold them to, and not by timing in
    the user's process."""
    if interpreted:
        dot = "bf16_emulated" if dtype == torch.bfloat16 else "ieee"
        return Launch(dot, *3 * [Blocks(64, 64, 4)])
    width = max(D, E)
    warps = 4 if width <= 64 else 8
    if dtype == torch.bfloat16:
        if width > 128:
            return Launch("bf16", *3 * [Blocks(32, 32, 8, 1)])
        blocks = Blocks(64, 64, warps)
        return Launch("bf16", blocks, blocks, Blocks(32, 64, warps))
    # float16 has too few exponents for the gradients of scores; tf32 has its digits.
    dot = "tf32" if dtype == torch.float16 else "ieee"
    blocks = Blocks(32 if width <= 64 else 16, 32, 8, 1)
    return Launch(dot, Blocks(32, 32, warps, 1), blocks, Blocks(16, 32, 8, 1))


class Call:
    """What all kernels are told of the call."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, starts: list[int] | None, window: Window
    ) -> None:
        from .triton_kernel import Sizes

        self.B, self.T, self.H, self.D = q.shape
        self.G, self.E = v.shape[2:]
        self.device, self.starts = q.device, starts
        self.launch = choose(self.D, self.E, q.dtype, TRITON_INTERPRETED)
        group, size = self.H // self.G, min(window.size, self.T)
        self.sinks = min(window.sinks, self.T)
        self.sizes = Sizes(self.T, self.B * self.T, group, size, self.sinks, window.scale)

    def totals(self) -> Tensor:
        return torch.empty(self.H, self.B * self.T, dtype=torch.float32, device=self.device)

    def rows(self, x_BTHD: Tensor) -> Any:
        from .triton_kernel import Rows

        x = x_BTHD if x_BTHD.stride(-1) == 1 else x_BTHD.contiguous()
        return Rows(x, *x.stride()[:3])

    def run(
        self, kernel: Any, blocks: Blocks, size: int, heads: int, tensors: Any, **flags: int
    ) -> None:
        """A program for each tile of `size` tokens of each head, and each block of first tokens
        where `flags` says how many."""
        table, slots = None, self.B * -(-self.T // size)
        if self.starts is not None:
            rows = cut(self.starts, size)
            table = torch.tensor(rows, dtype=torch.int32).to(self.device)
            slots = len(rows)
        grid = (slots, heads, flags.pop("blocks_of_sinks", 1))
        flags |= {"D": self.D, "E": self.E, "BLOCK_D": block(self.D), "BLOCK_E": block(self.E)}
        flags |= {"TILE": blocks.queries, "KEYS": blocks.keys, "PACKED": table is not None}
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[grid](
                *tensors,
                table=table,
                **self.sizes._asdict(),
                DOT=self.launch.dot,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
                **flags,
            )


def forward(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    starts: list[int] | None,
    window: int,
    sinks: int,
    scale: float,
) -> list[Tensor]:
    """h, and lse as in triton_kernel.py."""
    from .triton_kernel import forward_kernel

    call = Call(q_BTHD, k_BTGD, v_BTGE, starts, Window(window, sinks, scale))
    h_BTHE = q_BTHD.new_empty(*q_BTHD.shape[:3], call.E)
    lse = call.totals()
    tensors = *map(call.rows, (q_BTHD, k_BTGD, v_BTGE, h_BTHE)), lse
    blocks = call.launch.forward
    call.run(forward_kernel, blocks, blocks.queries, call.H, tensors)
    return [h_BTHE, lse]


def backward(
    dh_BTHE: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    h_BTHE: Tensor,
    lse: Tensor,
    starts: list[int] | None,
    window: int,
    sinks: int,
    scale: float,
) -> list[Tensor]:
    """dq, dk and dv."""
    from .triton_kernel import queries_kernel
    from .triton_keys import Queries, keys_kernel, sinks_kernel

    call = Call(q_BTHD, k_BTGD, v_BTGE, starts, Window(window, sinks, scale))
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHD, k_BTGD, v_BTGE)]
    q, k, v, h, dh = map(call.rows, (q_BTHD, k_BTGD, v_BTGE, h_BTHE, dh_BTHE))
    dq, dk, dv = map(call.rows, made)
    delta = call.totals()
    blocks = call.launch.queries
    call.run(queries_kernel, blocks, blocks.queries, call.H, (q, k, v, h, dh, dq, lse, delta))
    # Where a window holds all, no first token lies before one.
    sinks = call.sinks if call.sizes.window < call.T else 0
    spans = call.B * -(-call.T // SPAN) if starts is None else len(cut(starts, SPAN))
    parts = [lse.new_empty(spans, call.G, sinks, width) for width in (call.D, call.E)]
    queries, blocks, G = Queries(q, dh, lse, delta), call.launch.keys, call.G
    if sinks:
        count = -(-sinks // blocks.keys)
        call.run(sinks_kernel, blocks, SPAN, G, (queries, k, v, *parts), G=G, blocks_of_sinks=count)
    tensors = (queries, k, v, dk, dv, *parts)
    call.run(keys_kernel, blocks, blocks.keys, G, tensors, G=G, SINKS=sinks > 0)
    return made


def block(width: int) -> int:
    """The smallest power of two that holds `width`, and no less than 16, which products need."""
    return max(16, 1 << max(0, width - 1).bit_length())
