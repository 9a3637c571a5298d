"""A few steps of the mLSTM in Triton on CUDA and HIP tensors: check, allocate, launch, return."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import triton_refuses
from ...memory import dense_rows, plain
from .arguments import kept_rows, read_rows
from .shapes import next_shapes, row_strides, state_dtypes, token_count, token_strides

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_K = 512
# Elements of c that a thread holds: as many loads under way, and no register spilled.
THREAD_ELEMENTS = 64


class Blocks(NamedTuple):
    """A program's part of c, all of K and `v` columns, and the warps that hold it."""

    k: int
    v: int
    warps: int


def supports(q_BTHK: Tensor) -> str | None:
    if q_BTHK.dtype not in DTYPES:
        return f"q must be float32, bfloat16 or float16, got {q_BTHK.dtype}"
    if q_BTHK.shape[-1] > LARGEST_K:
        return f"K must be at most {LARGEST_K}, got {q_BTHK.shape[-1]}"
    return triton_refuses("q", q_BTHK.device)


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    c_PHKV: Tensor,
    n_PHK: Tensor,
    m_PH: Tensor,
    state_index: Tensor | None,
    all_states: bool,
    *options: Any,
) -> list[Tensor]:
    dtypes = state_dtypes(q_BTHK, c_PHKV)
    state = [c_PHKV, n_PHK, m_PH]
    if state_index is None:
        state = [plain(part, dtype) for part, dtype in zip(state, dtypes, strict=True)]
    elif state_index.device.type == "cpu":
        read_rows(state_index, c_PHKV.shape[0])
    shapes = next_shapes(q_BTHK, v_BTHV, all_states)
    after = [q_BTHK.new_empty(shape, dtype=d) for shape, d in zip(shapes, dtypes, strict=True)]
    h_BTHV = v_BTHV.new_empty(v_BTHV.shape)
    call = _Call((q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH), options, h_BTHV, state, after)
    kept = "all" if all_states else "last"
    call.launch(state_index, None, KEPT=kept, INPLACE=False, MEMORY=True, VECTORS=True)
    return [h_BTHV, *after]


def update(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    c_PHKV: Tensor,
    n_PHK: Tensor,
    m_PH: Tensor,
    h_BTHV: Tensor,
    state_index: Tensor | None,
    save_index: Tensor | None,
    *options: Any,
) -> None:
    """The state is of the dtypes of the next one, each row contiguous, and so is h."""
    state = [c_PHKV, n_PHK, m_PH]
    if state_index is not None and state_index.device.type == "cpu":
        kept_rows(state_index, save_index, token_count(q_BTHK), c_PHKV.shape[0])
    call = _Call((q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH), options, h_BTHV, state, state)
    kept = "last" if save_index is None else "index"
    # Every program of a head reads n and m: they are written once all have.
    for memory in (True, False):
        how = {"KEPT": kept, "MEMORY": memory, "VECTORS": not memory}
        call.launch(state_index, save_index, INPLACE=True, **how)
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version([h_BTHV, *state])


def choose(K: int, V: int) -> Blocks:
    """Columns enough for whole cache lines, and no more than fit in registers."""
    k, v = _power_of_two(K), 32
    while v < min(V, 128) and k * v < 128 * THREAD_ELEMENTS:
        v *= 2
    warps = min(8, max(1, k * v // (32 * THREAD_ELEMENTS)))
    return Blocks(k, v, warps)


def _power_of_two(width: int) -> int:
    """The smallest that holds `width`."""
    return 1 << max(0, width - 1).bit_length()


class _Call:
    """What all launches are told of the call."""

    def __init__(
        self,
        tokens: tuple[Tensor, ...],
        options: tuple[Any, ...],
        h_BTHV: Tensor,
        before: list[Tensor],
        after: list[Tensor],
    ):
        from .triton_kernel import Rows, States, Tokens

        q, k, v, *gates = tokens
        self.device, self.T = q.device, token_count(q)
        self.B, (self.H, self.K), self.V = q.shape[0], q.shape[-2:], v.shape[-1]
        dims = q.dim()
        heads = (*(dense_rows(x) for x in (q, k, v)), h_BTHV)
        self.tokens = Tokens(*(Rows(x, *token_strides(x, dims)) for x in heads))
        self.gates = [arg for x in gates for arg in (x, *token_strides(x, dims))]
        self.states = [States(*state, *row_strides(state)) for state in (before, after)]
        input_gate, normalizer, *self.factors = options
        self.flags = {"INPUT_GATE": input_gate, "NORMALIZER": normalizer}

    def launch(self, read: Tensor | None, kept: Tensor | None, **flags: Any) -> None:
        from .triton_kernel import step_kernel

        blocks = choose(self.K, self.V)
        grid = self.B * self.H, -(-self.V // blocks.v) if flags["MEMORY"] else 1
        if 0 in grid:
            return
        unused = (self.tokens.q.ptr, 0, 0)
        with self._on_device():
            step_kernel[grid](
                self.tokens,
                *self.gates,
                *self.states,
                *(unused[:2] if read is None else (read, read.stride(0))),
                *(unused if kept is None else (kept, *kept.stride(), 0)[:3]),
                self.T,
                self.H,
                *self.factors,
                K=self.K,
                V=self.V,
                BLOCK_K=blocks.k,
                BLOCK_V=blocks.v,
                POOLED=read is not None,
                num_warps=blocks.warps,
                **self.flags,
                **flags,
            )

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
