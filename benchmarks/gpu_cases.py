"""What is timed on a GPU: calls by case and variant, on tensors of the device. As a program it
times the case whose id it is given, and prints `measure`'s answer as JSON.

A case is timed when the tests of its operation have passed there (`gpu.py`), so it has no gate of
its own. Inputs rotate through more than the chip's L2, so that a call reads memory.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import xlstm_kernels as xk

from .timing import Summary, summarize

L2_BYTES = 64 << 20
SAMPLES, WARM_UP = 30, 5
DEVICE = "cuda"
LINEAR_LOSSES = ("linear_kl_div", "linear_topk_kl_div", "linear_cross_entropy")
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
    for backward in (True, False):
        for N, V in ((8192, 128256), (32768, 32000)):
            yield _kl_div(N, V, backward)
        yield _topk_kl_div(8192, 128256, 256, backward)
    for op in LINEAR_LOSSES:
        yield _linear_loss(op, 8192, 4096, 128256, 256)


def measure(case: GpuCase) -> dict[str, Summary | str]:
    """By variant the microseconds of a call, or why there are none."""
    found: dict[str, Summary | str] = {}
    for variant in case.calls():
        try:
            found[variant] = _time(case, variant)
        except Exception as error:  # a peer's may be of any kind
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
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_(grad)


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
        leaves = [x, r, b]

        def ours(backend: str) -> Callable[[], Tensor]:
            return lambda: getattr(xk, op)(x, r, b, backend=backend)[0]

        found = {"cuda": _call(ours("cuda"), leaves)}
        if D <= 128:  # a program runs a whole head
            found["triton"] = _call(ours("triton"), leaves)
        if B == 16 and dtype == torch.bfloat16:
            for kernel in ("cuda_fused", "cuda"):
                found[f"flashrnn {kernel}"] = _call(_flashrnn(op, kernel, x, r, b), leaves)
        if op == "lstm" and H == 1:
            # cuDNN's has the input's projection as well: D to 4 D.
            layer = torch.nn.LSTM(D, D, batch_first=True, device=DEVICE, dtype=dtype)
            given = _draw(B, T, D, dtype=dtype, grad=backward)
            layer.requires_grad_(backward)
            found["nn.LSTM"] = _call(lambda: layer(given)[0], [given, *layer.parameters()])
        return found

    shape = f"B{B} T{T} H{H} D{D}"
    return GpuCase(op, _direction(backward), dtype, shape, T, calls)


def _flashrnn(op: str, kernel: str, x: Tensor, r: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """h of the package flashrnn, where that is installed. It compiles itself, for minutes, for each
    B, H and D, which is why one B has it."""

    def run() -> Tensor:
        flashrnn = importlib.import_module("flashrnn").flashrnn
        states, _ = flashrnn(x, r, b, function=op, backend=kernel, dtype="bfloat16")
        return states[0]

    return run


def _mlstm(B: int, T: int, H: int, K: int, V: int, backward: bool) -> GpuCase:
    dtype = torch.bfloat16

    def calls() -> dict[str, Call]:
        q, k, v = (_draw(B, T, H, size, dtype=dtype, grad=backward) for size in (K, K, V))
        i, f = (_draw(B, T, H, dtype=dtype, grad=backward) for _ in range(2))
        leaves = [q, k, v, i, f]
        return {"triton": _call(lambda: xk.mlstm(*leaves, backend="triton")[0], leaves)}

    shape = f"B{B} T{T} H{H} K{K} V{V}"
    return GpuCase("mlstm", _direction(backward), dtype, shape, 0, calls)


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


def _kl_div(N: int, V: int, backward: bool) -> GpuCase:
    dtype = torch.bfloat16

    def calls() -> dict[str, Call]:
        student, teacher = _draw(N, V, dtype=dtype, grad=backward), _draw(N, V, dtype=dtype)

        def ours(backend: str) -> Callable[[], Tensor]:
            return lambda: xk.kl_div(student, teacher, reduction="batchmean", backend=backend)

        compiled = torch.compile(_eager_kl_div)
        losses = {"cuda": ours("cuda"), "triton": ours("triton")}
        losses |= {
            "eager": lambda: _eager_kl_div(student, teacher),
            "torch.compile": lambda: compiled(student, teacher),
            "liger": lambda: _liger("LigerKLDIVLoss", reduction="batchmean")(
                F.log_softmax(student, -1), F.softmax(teacher, -1)
            ),
        }
        return {name: _call(loss, [student]) for name, loss in losses.items()}

    return GpuCase("kl_div", _direction(backward), dtype, f"N{N} V{V}", 0, calls)


def _topk_kl_div(N: int, V: int, K: int, backward: bool) -> GpuCase:
    dtype = torch.bfloat16

    def calls() -> dict[str, Call]:
        student = _draw(N, V, dtype=dtype, grad=backward)
        words = _words(N, V, K)

        def ours(backend: str) -> Callable[[], Tensor]:
            return lambda: xk.topk_kl_div(student, *words, reduction="batchmean", backend=backend)

        return {name: _call(ours(name), [student]) for name in ("cuda", "triton")}

    return GpuCase("topk_kl_div", _direction(backward), dtype, f"N{N} V{V} K{K}", 0, calls)


def _linear_loss(op: str, N: int, E: int, V: int, K: int) -> GpuCase:
    """Beside its products alone, which are torch's in bfloat16."""
    dtype = torch.bfloat16

    def calls() -> dict[str, Call]:
        student = [_draw(N, E, dtype=dtype, grad=True), _draw(V, E, dtype=dtype, grad=True)]
        teacher: list[Tensor] = []
        if op == "linear_kl_div":
            teacher = target = [_draw(N, E, dtype=dtype), _draw(V, E, dtype=dtype)]
        elif op == "linear_topk_kl_div":
            target = list(_words(N, V, K))
        else:
            target = [torch.randint(0, V, (N,), device=DEVICE)]

        def ours(backend: str) -> Callable[[], Tensor]:
            return lambda: getattr(xk, op)(*student, *target, backend=backend)

        def products() -> object:
            with torch.no_grad():
                for x, w in (student, teacher) if teacher else (student,):
                    dz = x @ w.mT
                return dz @ student[1], dz.mT @ student[0]

        found = {name: _call(ours(name), student) for name in ("cuda", "triton")}
        found["products alone"] = products
        if op == "linear_kl_div":
            peer = "LigerFusedLinearJSD"
            given = (*student, *teacher)
            found["liger"] = _call(lambda: _liger(peer, jsd_beta=0.0)(*given), student)
        elif op == "linear_cross_entropy":
            peer = "LigerFusedLinearCrossEntropyLoss"
            found["liger"] = _call(lambda: _liger(peer)(student[1], student[0], *target), student)
        return found

    return GpuCase(op, _direction(True), dtype, f"N{N} E{E} V{V}", 0, calls)


def _direction(backward: bool) -> str:
    return "fwd+bwd" if backward else "fwd"


def _words(N: int, V: int, K: int) -> tuple[Tensor, Tensor]:
    logprobs, ids = _draw(N, V, dtype=torch.bfloat16).log_softmax(-1).topk(K)
    return logprobs, ids


def _eager_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student, -1), F.softmax(teacher, -1)
    return F.kl_div(log_q, p, reduction="batchmean")


def _liger(layer: str, **options: object) -> Callable[..., Tensor]:
    """A loss of Liger Kernel, where that is installed."""
    return getattr(importlib.import_module("liger_kernel.transformers"), layer)(**options)


if __name__ == "__main__":
    [chosen] = [case for case in gpu_cases() if case.id == sys.argv[1]]
    found = measure(chosen)
    print(json.dumps({k: v if isinstance(v, str) else asdict(v) for k, v in found.items()}))
