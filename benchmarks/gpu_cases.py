"""What is timed on a GPU: calls by case and variant, on tensors of the device.

A case is timed when the tests of its operation have passed there (`gpu.py`), so it has no gate of
its own. Inputs rotate through more than the chip's L2, so that a call reads memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import xlstm_kernels as xk

from .timing import Summary, summarize

L2_BYTES = 64 << 20
SAMPLES, WARM_UP = 30, 5
Call = Callable[[], object]


@dataclass(frozen=True)
class GpuCase:
    """`calls` makes the calls by variant, ours first, on fresh inputs; `steps` are those that wait
    for one another, 0 where none do."""

    op: str
    direction: str
    dtype: torch.dtype
    shape: str
    steps: int
    calls: Callable[[], dict[str, Call]]

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.op, self.direction, *self.shape.split(), dtype])


def gpu_cases() -> Iterator[GpuCase]:
    """All of them. To measure another shape or operation, add it here."""
    for backward in (False, True):
        for B in (16, 1, 256):
            for D in (64, 128, 32, 256, 768, 1024):
                H = max(1, 768 // D)
                yield _recurrence("slstm", torch.bfloat16, B, 1024, H, D, backward)
                if H == 1:
                    yield _recurrence("lstm", torch.bfloat16, B, 1024, H, D, backward)
        for D in (64, 256):
            yield _recurrence("slstm", torch.float32, 16, 1024, 768 // D, D, backward)
        for B, T in ((8, 8192), (1, 65536)):
            yield _mlstm(B, T, 16, 128, 256, backward)
    yield _mlstm_step(32, 8, 256, 512)


def measure(case: GpuCase) -> dict[str, Summary | str]:
    """By variant the microseconds of a call, or why there are none."""
    found: dict[str, Summary | str] = {}
    for variant in case.calls():
        try:
            found[variant] = _time(case, variant)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            found[variant] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _time(case: GpuCase, variant: str) -> Summary:
    before = torch.cuda.memory_allocated()
    calls = [case.calls()[variant]]
    set_bytes = max(1, torch.cuda.memory_allocated() - before)
    calls += [case.calls()[variant] for _ in range(min(15, 3 * L2_BYTES // set_bytes))]
    for turn in range(WARM_UP):
        calls[turn % len(calls)]()
    samples = []
    for turn in range(SAMPLES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[turn % len(calls)]()
        stop.record()
        stop.synchronize()
        samples.append(1e3 * start.elapsed_time(stop))
    del calls
    gc.collect()
    return summarize(samples)


def _draw(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda").requires_grad_(grad)


def _call(run: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """`run`, and the gradients of `leaves` where they have one."""
    if not leaves[0].requires_grad:
        return run
    weight: list[Tensor] = []

    def forward_and_backward() -> object:
        h = run()
        if not weight:
            weight.append(torch.randn_like(h))
        return torch.autograd.grad(h, leaves, weight[0])

    return forward_and_backward


def _recurrence(
    op: str, dtype: torch.dtype, B: int, T: int, H: int, D: int, backward: bool
) -> GpuCase:
    def calls() -> dict[str, Call]:
        x = _draw(B, T, 4, H, D, dtype=dtype, grad=backward)
        r = (_draw(4, H, D, D, dtype=dtype) / D**0.5).requires_grad_(backward)
        b = _draw(4, H, D, dtype=dtype, grad=backward)
        function = getattr(xk, op)
        ours = _call(lambda: function(x, r, b, backend="cuda")[0], [x, r, b])
        if op != "lstm" or H > 1:
            return {"cuda": ours}
        # cuDNN's has the input's projection as well: D to 4 D.
        layer = torch.nn.LSTM(D, D, batch_first=True, device="cuda", dtype=dtype)
        given = _draw(B, T, D, dtype=dtype, grad=backward)
        leaves = [given, *layer.parameters()]
        layer.requires_grad_(backward)
        return {"cuda": ours, "nn.LSTM": _call(lambda: layer(given)[0], leaves)}

    shape = f"B{B} T{T} H{H} D{D}"
    return GpuCase(op, "fwd+bwd" if backward else "fwd", dtype, shape, T, calls)


def _mlstm(B: int, T: int, H: int, K: int, V: int, backward: bool) -> GpuCase:
    dtype = torch.bfloat16

    def calls() -> dict[str, Call]:
        q, k, v = (_draw(B, T, H, size, dtype=dtype, grad=backward) for size in (K, K, V))
        i, f = (_draw(B, T, H, dtype=dtype, grad=backward) for _ in range(2))
        leaves = [q, k, v, i, f]
        return {"triton": _call(lambda: xk.mlstm(*leaves, backend="triton")[0], leaves)}

    shape = f"B{B} T{T} H{H} K{K} V{V}"
    return GpuCase("mlstm", "fwd+bwd" if backward else "fwd", dtype, shape, 0, calls)


def _mlstm_step(B: int, H: int, K: int, V: int) -> GpuCase:
    dtype = torch.bfloat16

    def calls() -> dict[str, Call]:
        q, k, v = (_draw(B, H, size, dtype=dtype) for size in (K, K, V))
        i, f = (_draw(B, H, dtype=dtype) for _ in range(2))
        sizes = ((B, H, K, V), (B, H, K), (B, H))
        state = xk.MLSTMState(*(_draw(*size, dtype=torch.float32) for size in sizes))
        return {
            "triton": lambda: xk.mlstm_step(q, k, v, i, f, state, inplace=True, backend="triton")
        }

    return GpuCase("mlstm_step", "fwd", dtype, f"B{B} T1 H{H} K{K} V{V}", 1, calls)
