"""Cases of the mLSTM: inputs, a run of every output and gradient, and the check against float64."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

import xlstm_kernels as xk
from xlstm_kernels.backends import TRITON_INTERPRETED
from xlstm_kernels.cells import compute_dtype
from xlstm_kernels.cells.mlstm import INPUT_GATES, NORMALIZERS, Options
from xlstm_kernels.ops.mlstm import reference
from xlstm_kernels.ops.mlstm.op import MLSTM
from xlstm_kernels.testing import check_results, lay_out, packed, run

BACKENDS = [backend.value for backend in MLSTM.table]
# In the interpreter a call takes seconds; what tests/test_mlstm_triton.py has is fast.
SLOW = {"triton"} if TRITON_INTERPRETED else set()
# Where a GPU's compiled kernels run; inputs and results of a case stay on the CPU.
DEVICES = {} if TRITON_INTERPRETED else {"triton": "cuda"}
ON_CPU = pytest.mark.skipif(bool(DEVICES), reason="its tensors are on the CPU")
EACH_BACKEND = [
    pytest.param(b, marks=[pytest.mark.slow, ON_CPU] if b == "triton" else []) for b in BACKENDS
]
# float64 has no product on a GPU's matrix units.
FLOAT64 = [backend for backend in BACKENDS if backend != "triton"]
FLAGS = [{"input_gate": g, "normalizer": n} for g in INPUT_GATES for n in NORMALIZERS]
INPUTS = ("q", "k", "v", "i", "f")
STATE = xk.MLSTMState._fields
# Where q n is near 0, h and every gradient have its relative error, which is that of one order of
# summing over the past. A result that misses the budget of the recurrence is held to the root mean
# square with the chunkwise form at these sizes, and K and V in another order each.
PLAIN_CHUNKS = (8, 16, 32, 64)
# By normaliser. "max" divides by |q n| wherever that is above exp(-m), however far it cancels. Of
# 60 seeds (T 70, K 24, V 40, float32) some result of plain torch's own chunkwise form misses the
# budget that its recurrent form earns in 8, the kernel in 6; twice that budget, in 1 and 1.
WIDENED = {"max": 2.0, "plain": 1.0, "none": 1.0}


@dataclass(frozen=True)
class MLSTMCase:
    """One call of `xk.mlstm`; `str` names it and seeds its inputs.

    Args:
        lengths: of packed sequences; B is then 1 and T their sum.
        state: "zero" (None is passed), "random" or "large".
        gates: None: i of unit size and f around 3; else each is +-`gates`.
        layout: of q, k and v, as `testing.lay_out` has them.
    """

    backend: str
    B: int = 2
    T: int = 70
    H: int = 2
    K: int = 24
    V: int = 40
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    state: str = "random"
    gates: float | None = None
    layout: str = "contiguous"
    input_gate: str = "exp"
    normalizer: str = "max"
    scale: float | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "B", 1)
            object.__setattr__(self, "T", sum(self.lengths))

    def __str__(self) -> str:
        sizes = "-".join(f"{axis}{getattr(self, axis)}" for axis in "BTHKV")
        parts = ["mlstm", self.backend, sizes, str(self.dtype).removeprefix("torch.")]
        for field in fields(self)[7:]:
            value = getattr(self, field.name)
            if value != field.default:
                text = "_".join(map(str, value)) if isinstance(value, tuple) else str(value)
                parts.append(f"{field.name}_{text or 'none'}")
        return "-".join(parts)

    @property
    def seed(self) -> int:
        """The same for every backend."""
        return zlib.crc32(str(replace(self, backend="any")).encode())

    @property
    def options(self) -> Options:
        scale = self.K**-0.5 if self.scale is None else self.scale
        return Options(self.input_gate, self.normalizer, scale, 1e-6)

    @property
    def sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return packed(self.lengths)


def on_every_backend(*variants: dict, backends: Collection[str] = BACKENDS) -> list:
    """pytest parameters: each variant on each backend that has its dtype."""
    cases = [MLSTMCase(backend, **variant) for variant in variants for backend in backends]
    cases = [c for c in cases if c.dtype != torch.float64 or c.backend in (*FLOAT64, "reference")]
    slow = [pytest.mark.slow]
    return [pytest.param(c, id=str(c), marks=slow * (c.backend in SLOW)) for c in cases]


def mlstm_inputs(case: MLSTMCase) -> dict[str, Tensor]:
    """q, k, v, i, f and states by name, and what the loss multiplies outputs with (`weight_*`)."""
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    positive = case.normalizer == "plain"  # divides by q n, which must not come near 0
    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    if positive:
        inputs |= {"q": inputs["q"].abs(), "k": inputs["k"].abs()}
    inputs = {name: lay_out(x.to(case.dtype), case.layout) for name, x in inputs.items()}
    i, f = normal(B, T, H), normal(B, T, H) + 3
    if case.gates is not None:
        i, f = case.gates * i.sign(), case.gates * (f - 3).sign()
    inputs |= {"i": i, "f": f}
    dtype = compute_dtype(case.dtype)
    rows, size = case.sequences, 30.0 if case.state == "large" else 1.0
    if case.state != "zero":
        n = normal(rows, H, K)
        inputs["c0"] = (size * normal(rows, H, K, V)).to(dtype)
        inputs["n0"] = (size * (n.abs() if positive else n)).to(dtype)
        inputs["m0"] = normal(rows, H).to(dtype)
    inputs["weight_h"] = normal(B, T, H, V).to(case.dtype)
    for field, shape in zip(STATE, ((K, V), (K,), ()), strict=True):
        inputs[f"weight_last_{field}"] = normal(rows, H, *shape).to(dtype)
    return inputs


def call_mlstm(
    case: MLSTMCase, inputs: Mapping[str, Tensor], backend: str | reference.Form
) -> tuple[Tensor, xk.MLSTMState]:
    state = tuple(inputs[f"{field}0"] for field in STATE if f"{field}0" in inputs)
    if not isinstance(backend, str):
        tensors = [inputs[name] for name in INPUTS]
        start = xk.MLSTMState(*state) if state else None
        return reference.forward(*tensors, start, case.cu_seqlens, case.options, backend)
    device = DEVICES.get(backend, "cpu")
    cu_seqlens = case.cu_seqlens
    h, last = xk.mlstm(
        *(inputs[name].to(device) for name in INPUTS),
        tuple(part.to(device) for part in state) or None,
        input_gate=case.input_gate,
        normalizer=case.normalizer,
        scale=case.scale,
        chunk_size=None if backend == "reference" else case.chunk_size,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device),
        backend=backend,
    )
    return h.cpu(), xk.MLSTMState(*(part.cpu() for part in last))


def run_mlstm(
    case: MLSTMCase,
    inputs: Mapping[str, Tensor],
    backend: str | reference.Form,
    through: Collection[str] | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """`run` of the case on a backend of `xk.mlstm`, or on a form of the reference."""
    return run(partial(call_mlstm, case, backend=backend), inputs, through, wanted)


def exact_mlstm(
    case: MLSTMCase, inputs: Mapping[str, Tensor], through: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The float64 reference on the same, already rounded, inputs."""
    double = {name: x.double() for name, x in inputs.items()}
    return run_mlstm(replace(case, dtype=torch.float64), double, "reference", through)


def check_mlstm(
    case: MLSTMCase,
    through: Collection[str] | None = None,
    got: Mapping[str, Tensor] | None = None,
) -> None:
    """Raises AssertionError unless `case` gives every output and gradient within its budget, or
    `got`, where its results came about in another way."""
    inputs = mlstm_inputs(case)
    exact = exact_mlstm(case, inputs, through)
    if got is None:
        got = run_mlstm(case, inputs, case.backend, through)

    # Triton multiplies two-byte operands: float32 results are as exact as those. Of 5 flags the
    # largest error of a state or of a gate's gradient is 4e-3 for bfloat16 (eps 8e-3).
    operands = case.dtype if case.backend == "triton" else None
    check_results(got, exact, plain_runs(case, inputs, through), WIDENED[case.normalizer], operands)


def plain_runs(
    case: MLSTMCase, inputs: Mapping[str, Tensor], through: Collection[str] | None = None
) -> Iterator[Mapping[str, Tensor]]:
    """Plain torch's results: the recurrence, then the chunkwise form in other orders."""
    yield run_mlstm(case, inputs, "reference", through)
    draw = torch.Generator().manual_seed(case.seed)
    for chunk_size in PLAIN_CHUNKS:
        form = partial(reference.chunkwise, chunk_size=chunk_size)
        orders = [torch.randperm(size, generator=draw) for size in (case.K, case.V)]
        yield _run_reordered(case, inputs, form, orders, through)


def _run_reordered(
    case: MLSTMCase,
    inputs: Mapping[str, Tensor],
    form: reference.Form,
    orders: list[Tensor],
    through: Collection[str] | None,
) -> dict[str, Tensor]:
    """Plain torch's results with K and V in another order, brought back: the same numbers, summed
    in another order."""

    def reorder(name: str, x: Tensor, order_K: Tensor, order_V: Tensor) -> Tensor:
        kind = name.removeprefix("weight_").removeprefix("last_").removeprefix("d_")[0]
        if kind in "qkn":
            return x[..., order_K]
        if kind == "c":
            return x[..., order_K, :][..., order_V]
        return x[..., order_V] if kind in "vh" else x

    inputs = {name: reorder(name, x, *orders) for name, x in inputs.items()}
    results = run_mlstm(case, inputs, form, through)
    back = [order.argsort() for order in orders]
    return {name: reorder(name, x, *back) for name, x in results.items()}
