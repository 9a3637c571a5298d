"""The mLSTM in Triton on CUDA and HIP tensors: check, allocate, launch, return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backends import TRITON_INTERPRETED, triton_refuses
from .shapes import STATE_INTERVAL, saved_shapes, state_shapes
from .triton_launch import Args, Call, Flags, block, rows_together

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(q_BTHK: Tensor) -> str | None:
    if q_BTHK.dtype not in DTYPES:
        return f"q must be float32, bfloat16 or float16, got {q_BTHK.dtype}"
    return triton_refuses("q", q_BTHK.device)


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    c_BHKV: Tensor | None,
    n_BHK: Tensor | None,
    m_BH: Tensor | None,
    cu_seqlens: Tensor | None,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
    chunk_size: int,
    save: bool,
) -> list[Tensor]:
    from . import triton_outputs, triton_states
    from .triton_tiles import State

    inputs = q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH
    call = Call(*inputs, cu_seqlens, chunk_size, TRITON_INTERPRETED)
    h_BTHV = _empty_like(v_BTHV)
    last = State(*(call.empty(*s) for s in state_shapes(call.sequences, q_BTHK, v_BTHV)))
    row_m, row_den, *parts = (call.empty(*s) for s in saved_shapes(q_BTHK, v_BTHV, cu_seqlens))
    if save and cu_seqlens is not None:
        for part in parts:
            part.zero_()  # the last rows belong to no sequence
    states = State(*parts)
    given = [_plain(part) for part in (c_BHKV, n_BHK, m_BH) if part is not None]
    initial = State(*given) if given else last
    key_log = call.empty(call.H, call.sizes.BT)
    decay, tile_m = (call.empty(call.H, call.sizes.slots) for _ in range(2))
    blocks, dot = call.launch.states, call.launch.dot
    split = call.split(blocks)
    own = states._replace(m=call.empty(*states.m.shape)) if split else states
    gate = {"INPUT_GATE": input_gate}
    flags = {"HAS_INITIAL": bool(given), **gate}
    with call.on_device():
        args: Args = (call.k, call.v, *call.gates, initial, own, last, key_log, decay, tile_m)
        call.walk(
            triton_states.states_kernel, blocks, split, args, {"DOT": dot, "SPLIT": split, **flags}
        )
        if split:
            args = (initial, states, own.m, last, decay, tile_m)
            call.walk(triton_states.scan_kernel, call.launch.scan, False, args, flags)
        args = (call.q, call.k, call.v, call.rows(h_BTHV), *call.gates, states, key_log, decay)
        args += (tile_m, row_m, row_den, scale, eps)
        flags = {"NORMALIZER": normalizer, "DOT": dot, "SAVE": save, **gate}
        call.each_tile(triton_outputs.outputs_kernel, call.launch.outputs, "values", args, flags)
    return [h_BTHV, *last, *((row_m, row_den, *states) if save else ())]


def backward(
    dh_BTHV: Tensor | None,
    dc_BHKV: Tensor | None,
    dn_BHK: Tensor | None,
    dm_BH: Tensor | None,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    saved: list[Tensor],
    cu_seqlens: Tensor | None,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
    chunk_size: int,
    want_state: bool,
) -> list[Tensor]:
    from .triton_gradients import TileScratch, TokenScratch
    from .triton_tiles import State

    inputs = q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH
    call = Call(*inputs, cu_seqlens, chunk_size, TRITON_INTERPRETED)
    row_m, row_den, *states = saved
    dh = torch.zeros_like(v_BTHV) if dh_BTHV is None else rows_together(dh_BTHV)
    dq, dk, dv = map(_empty_like, (q_BTHK, k_BTHK, v_BTHV))
    di, df = (call.empty(*i_BTH.shape) for _ in range(2))
    shapes = state_shapes(call.sequences, q_BTHK, v_BTHV)
    dlast = [
        row_m.new_zeros(shape) if part is None else _plain(part)
        for part, shape in zip((dc_BHKV, dn_BHK, dm_BH), shapes, strict=True)
    ]
    dinitial = [call.empty(*(shape if want_state else (0,))) for shape in shapes]
    if want_state:
        dinitial[2].copy_(dlast[2])  # that of a sequence of no tokens
    work = _Gradients(
        call=call,
        rows=tuple(map(call.rows, (dh, dq, dk, dv))),
        gates=(di, df),
        row_m=row_m,
        row_den=row_den,
        states=State(*states),
        dlast=State(*dlast),
        dinitial=State(*dinitial),
        dstates=State(*(call.empty(*part.shape) for part in states)),
        tokens=TokenScratch(*call.scratch(9, call.sizes.BT)),
        tiles=TileScratch(*call.scratch(5, call.sizes.slots)),
        crossings=call.empty(call.intervals, call.H, *[2 * STATE_INTERVAL // call.launch.tile] * 2),
    )
    with call.on_device():
        work.run(input_gate, normalizer, scale, eps, want_state)
    return [dq, dk, dv, di, df, *dinitial]


@dataclass(frozen=True)
class _Gradients:
    """What the kernels of a backward pass read and write."""

    call: Call
    rows: Args  # dh, dq, dk, dv
    gates: Args  # di, df
    row_m: Tensor
    row_den: Tensor
    states: Any
    dlast: Any
    dinitial: Any
    dstates: Any
    tokens: Any
    tiles: Any
    crossings: Tensor

    def run(
        self, input_gate: str, normalizer: str, scale: float, eps: float, want_state: bool
    ) -> None:
        from . import triton_dkeys, triton_gradients

        call, launch, scratch = self.call, self.call.launch, (self.tokens, self.tiles)
        gate: Flags = {"INPUT_GATE": input_gate}
        dot, normal = {"DOT": launch.dot}, {"NORMALIZER": normalizer}
        dh, dq, dk, dv = self.rows
        inputs: Args = call.q, call.k, call.v, dh
        rows: Args = self.row_m, self.row_den, *scratch
        args: Args = (*call.gates, self.states, *rows, eps)
        call.each_tile(triton_gradients.prepare_kernel, launch.gates, None, args, gate | normal)
        args = (*inputs, dq, *call.gates, self.states, *rows, self.crossings, scale, eps)
        flags = gate | normal | dot
        call.each_tile(triton_gradients.queries_kernel, launch.queries, "keys", args, flags)
        carry = self.run_states(scale, dot | {"WANT_INITIAL": want_state})
        args = (*inputs, dk, dv, *call.gates, self.dstates, self.row_m, *scratch)
        args += (self.crossings, scale)
        for part in launch.key_flags(call.K, call.V):
            over = "keys" if part["DK"] else "values"
            flags = gate | dot | part
            call.each_tile(triton_dkeys.keys_kernel, launch.keys, over, args, flags)
        args = (*call.gates, self.row_m, self.dlast.m, *self.gates, self.dinitial.m, *scratch)
        args += (self.crossings, carry)
        parts = carry.shape[2]
        flags = {"CARRIES": parts, "PARTS": block(parts, parts), "WANT_INITIAL": want_state}
        call.each_tile(triton_dkeys.gates_kernel, launch.gates, None, args, flags | gate)

    def run_states(self, scale: float, flags: Flags) -> Tensor:
        """dstates and dinitial; returns the parts of carry."""
        from . import triton_dstates

        call, launch, (dh, *_) = self.call, self.call.launch, self.rows
        split = call.split(launch.dstates)
        parts = (launch.scan if split else launch.dstates).count(call.K, call.V)
        carry = call.empty(call.intervals, call.H, parts)
        ends: Args = self.dlast, self.dstates, self.dinitial, carry
        args: Args = (call.q, dh, self.states, *ends, self.tokens, self.tiles, scale)
        walk = flags | {"SPLIT": split}
        call.walk(triton_dstates.dstates_kernel, launch.dstates, split, args, walk)
        if split:
            flags = {"WANT_INITIAL": flags["WANT_INITIAL"]}
            args = (self.states, *ends, self.tiles)
            call.walk(triton_dstates.dscan_kernel, launch.scan, False, args, flags)
        return carry


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
