"""The oracle, the error measure and the budgets that every backend is held to; shipped, so that
users can check an install.

The oracle is the float64 reference on the same (already rounded) inputs. A result may be off by
twice the error of plain torch in that dtype plus four rounding steps, in the 2-norm of each tensor;
NaN fails. The largest single error is bounded too, so that one bad tile of a large tensor shows.

    >>> from xlstm_kernels.testing import RecurrenceCase, check_recurrence
    >>> check_recurrence(RecurrenceCase("slstm", "cpu", T=33, D=48))
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, GATES, compute_dtype
from .ops import recurrence


class Budget(NamedTuple):
    """A relative error may be `plain_factor` times plain torch's, plus `rounding_steps` eps."""

    plain_factor: float
    rounding_steps: float


# In the 2-norm. float64 against itself: plain torch is the oracle there, so its own rounding is all
# that is left. Sums over T steps of B*D products each round in another order; 64 eps covers
# T = 257, D = 256.
BUDGETS: Mapping[torch.dtype, Budget] = {
    torch.float64: Budget(2, 64),
    torch.float32: Budget(2, 4),
    torch.bfloat16: Budget(2, 4),
    torch.float16: Budget(2, 4),
}
# For the largest error of an element, as a part of the largest element: the tail of many draws,
# which scatters more than their norm.
WORST_ELEMENT_FACTOR = 4.0

# A tensor smaller than this counts as this large. Kernels saturate sigmoid before float32 does: a
# gradient through a closed gate may be 1e-26 where 1e-44 is exact.
SMALLEST = 1e-16

# With x in 16 bits these backends multiply factors of as many where plain torch has float32: h and
# the gates' gradients, by bfloat16 r and in dR. What they return in float32 is then held to the
# rounding steps of float16.
SHORT_OPERANDS = ("cuda", "triton")
# Tensor cores cut sums instead of rounding them, always towards zero, which adds up over the steps:
# over 12 seeds, the root mean square errors of float32 gradients were 0.9 to 1.48 times those of
# plain torch, and 1.73 times for c after 1000 steps of an exponential forget gate, where a bias
# of the gates adds up in m.
WIDENED = {"cuda": 2.0}

# Where gradients grow, plain torch's error depends on the order of its sums: one run is one draw
# from a wide distribution. A result that misses the budget of the first run is held to the root
# mean square of this many, each with its units in another order. Of 60 seeds of sLSTM with n = 0,
# c != 0, plain torch in another order misses the budget of its own first run in 10 % (exponential
# forget gate: 20 %), the kernel in 3 % (5 %); the kernel misses that of all five in 1.7 % (1.7 %).
PLAIN_RUNS = 5


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in 2-norms; NaN and inf stay visible."""
    return _relative(got, exact, lambda x: x.norm())


def worst_element_error(got: Tensor, exact: Tensor) -> float:
    """Largest |got - exact| by largest |exact|."""
    return _relative(got, exact, lambda x: x.abs().max() if x.numel() else x.sum())


def _relative(got: Tensor, exact: Tensor, size_of: Any) -> float:
    got, exact = got.detach().double(), exact.detach().double()
    return (size_of(got - exact) / size_of(exact).clamp(min=SMALLEST)).item()


def budget(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Largest relative error allowed for a result of `dtype`, given plain torch's result."""
    return _allowed([relative_error(plain, exact)], dtype)


def _allowed(plain_errors: Sequence[float], dtype: torch.dtype) -> float:
    plain_factor, rounding_steps = BUDGETS[dtype]
    runs = len(plain_errors)
    plain_error = math.sqrt(sum(e * e for e in plain_errors) / runs)
    if runs > 1:  # the root mean square of few draws is uncertain itself, by its standard error
        plain_error *= 1 + (2 * runs) ** -0.5
    return plain_factor * plain_error + rounding_steps * torch.finfo(dtype).eps


def check(name: str, got: Tensor, exact: Tensor, plain: Tensor, widened: float = 1.0) -> None:
    """Raises AssertionError unless `got` is as close to `exact` as its dtype allows.

    Args:
        got: the result under test.
        exact: the float64 reference's result on the same inputs.
        plain: the reference's result in the dtype of `got`'s inputs, which earns the budget.
        widened: factor on the budget; its reason belongs beside the caller's table.
    """
    _check_kind(name, got, exact, plain)
    missed = _missed(name, got, exact, [plain], widened)
    assert not missed, missed


def _check_kind(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, not {plain.dtype}"


def _missed(
    name: str,
    got: Tensor,
    exact: Tensor,
    plains: Sequence[Tensor],
    widened: float = 1.0,
    operands: torch.dtype | None = None,
) -> str:
    """What is wrong with `got`, or "", by the budget that all of `plains` earn together."""
    dtype = operands or got.dtype
    for measure, error_of, factor in (
        ("relative error", relative_error, widened),
        ("worst element's error", worst_element_error, widened * WORST_ELEMENT_FACTOR),
    ):
        error = error_of(got, exact)
        allowed = factor * _allowed([error_of(plain, exact) for plain in plains], dtype)
        if not error <= allowed:
            return f"{name}: {measure} {error:.2e}, budget {allowed:.2e}"
    return ""


Results = Mapping[str, Tensor]


def check_results(
    got: Results,
    exact: Results,
    plains: Iterator[Results],
    widened: float = 1.0,
    operands: torch.dtype | None = None,
) -> None:
    """`check` of every result by name. `plains` yields plain torch's results: the first earns the
    budget, all of them together where a result misses it. `operands`: of the backend's products,
    where they have fewer digits than a result; None: they have as many."""
    runs = [next(plains)]

    def missed(name: str) -> str:
        results = [run[name] for run in runs]
        return _missed(name, got[name], exact[name], results, widened, operands)

    for name in exact:
        _check_kind(name, got[name], exact[name], runs[0][name])
        if missed(name):
            runs += plains
        assert not (why := missed(name)), why


def packed(lengths: Sequence[int] | None) -> Tensor | None:
    """`cu_seqlens` of packed sequences of these lengths."""
    if lengths is None:
        return None
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` (B, T, ..., H, D) as a view: "contiguous", "head_first" (B, H, T, ..., D turned),
    "expanded" (batch stride 0) or "strided" (every other element of D, NaN between)."""
    if layout == "head_first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan).to(x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def run(
    call: Callable[[Results], tuple[Tensor, Any]],
    inputs: Results,
    through: Collection[str] | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Outputs of `call` by name (`h`, `last_<state>`), and gradients as `d_<input>`.

    Args:
        call: takes the inputs by name and returns h and a state.
        inputs: and `weight_<output>`, which the loss multiplies that output with.
        through: the outputs that the loss depends on; None: all.
        wanted: the inputs that require a gradient; None: all.
    """
    leaves = {
        name: x.detach().requires_grad_(wanted is None or name in wanted)
        for name, x in inputs.items()
        if not name.startswith("weight_")
    }
    h, last = call(leaves)
    results = {"h": h} | {f"last_{field}": part for field, part in last._asdict().items()}
    terms = [
        (result * inputs[f"weight_{name}"]).sum(dtype=compute_dtype(h.dtype))
        for name, result in results.items()
        if result.requires_grad and (through is None or name in through)
    ]
    if terms:
        torch.stack(terms).sum().backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            results[f"d_{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: result.detach() for name, result in results.items()}


@dataclass(frozen=True)
class RecurrenceCase:
    """One call of `xk.slstm` or `xk.lstm`; `str` names it and seeds its inputs.

    Args:
        cell: a name in `xlstm_kernels.cells.CELLS`.
        lengths: of packed sequences; B is then 1 and T their sum.
        weight_dtype: of r and b; None: x's.
        state: "zero" (None is passed), "random", "large", or "empty" (sLSTM: n = 0 but c != 0).
        gates: None: normal pre-activations; else each is +-`gates`.
        layout: of x, as `lay_out` has them.
    """

    cell: str
    backend: str
    B: int = 3
    T: int = 18
    H: int = 2
    D: int = 20
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    lengths: tuple[int, ...] | None = None
    bias: bool = True
    state: str = "random"
    gates: float | None = None
    layout: str = "contiguous"
    n_floor: float = 0.0
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "B", 1)
            object.__setattr__(self, "T", sum(self.lengths))

    def __str__(self) -> str:
        parts = [self.cell, self.backend, f"B{self.B}", f"T{self.T}", f"H{self.H}", f"D{self.D}"]
        parts.append(_short(self.dtype))
        for field in fields(self)[7:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}_{_short(value)}")
        return "-".join(parts)

    @property
    def seed(self) -> int:
        """The same for every backend."""
        return zlib.crc32(str(replace(self, backend="any")).encode())

    @property
    def sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "_".join(map(str, value)) or "none"
    return str(value).removeprefix("torch.")


def recurrence_inputs(case: RecurrenceCase) -> dict[str, Tensor]:
    """x, r, b and states by name, and what the loss multiplies each output with (`weight_*`)."""
    draw = torch.Generator().manual_seed(case.seed)
    G, H, D = len(GATES), case.H, case.D

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    x_BTGHD = normal(case.B, case.T, G, H, D)
    if case.gates is not None:
        x_BTGHD = case.gates * x_BTGHD.sign()
    weight_dtype = case.weight_dtype or case.dtype
    inputs = {
        "x": lay_out(x_BTGHD.to(case.dtype), case.layout),
        "r": (normal(G, H, D, D) / D**0.5).to(weight_dtype),
    }
    if case.bias:
        inputs["b"] = normal(G, H, D).to(weight_dtype)
    for name, part in _states(case, normal).items():
        inputs[name] = part.to(compute_dtype(case.dtype))
    inputs["weight_h"] = normal(case.B, case.T, H, D).to(case.dtype)
    for field in CELLS[case.cell].State._fields:
        inputs[f"weight_last_{field}"] = normal(case.sequences, H, D).to(compute_dtype(case.dtype))
    return inputs


def _states(case: RecurrenceCase, normal: Any) -> dict[str, Tensor]:
    if case.state == "zero":
        return {}
    size = 30.0 if case.state == "large" else 1.0
    states = {
        field: size * normal(case.sequences, case.H, case.D)
        for field in CELLS[case.cell].State._fields
    }
    if "n" in states:  # a sum of exponentials, by exp(m): positive
        states["n"] = 0 * states["n"] if case.state == "empty" else states["n"].abs() + 0.5
    return {f"{field}0": part for field, part in states.items()}


def call_recurrence(case: RecurrenceCase, inputs: Results, backend: str) -> tuple[Tensor, Any]:
    """h and the state of the public function that runs the case's cell."""
    state = tuple(inputs[f"{f}0"] for f in CELLS[case.cell].State._fields if f"{f}0" in inputs)
    arguments: Any = (inputs["x"], inputs["r"], inputs.get("b"), state or None)
    options: dict[str, Any] = {"cu_seqlens": packed(case.lengths), "backend": backend}
    function = CELLS[case.cell].function
    if function == "slstm":
        options["forget_gate"] = "exp" if case.cell == "slstm_exp" else "sigmoid"
        options |= {"n_floor": case.n_floor, "clip_grad": case.clip_grad}
    return getattr(recurrence, function)(*arguments, **options)


def run_recurrence(
    case: RecurrenceCase,
    inputs: Mapping[str, Tensor],
    backend: str,
    through: Collection[str] | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """`run` of the case on `backend`."""
    return run(partial(call_recurrence, case, backend=backend), inputs, through, wanted)


def check_recurrence(case: RecurrenceCase, through: Collection[str] | None = None) -> None:
    """Raises AssertionError unless `case` gives every output and gradient within its budget."""
    inputs = recurrence_inputs(case)
    exact = run_recurrence(
        replace(case, dtype=torch.float64),
        {name: t.double() for name, t in inputs.items()},
        "reference",
        through,
    )
    got = run_recurrence(case, inputs, case.backend, through)

    def plains() -> Iterator[Results]:
        yield run_recurrence(case, inputs, "reference", through)
        draw = torch.Generator().manual_seed(case.seed)
        for _ in range(PLAIN_RUNS - 1):
            yield _run_reordered(case, inputs, torch.randperm(case.D, generator=draw), through)

    short = case.backend in SHORT_OPERANDS and case.dtype in (torch.bfloat16, torch.float16)
    operands = torch.float16 if short else None
    check_results(got, exact, plains(), WIDENED.get(case.backend, 1.0), operands)


def _run_reordered(
    case: RecurrenceCase,
    inputs: Mapping[str, Tensor],
    order: Tensor,
    through: Collection[str] | None,
) -> dict[str, Tensor]:
    """Plain torch's results with the units of each head in another order, brought back: the same
    numbers, summed in another order."""

    def reorder(name: str, t: Tensor, order: Tensor) -> Tensor:
        t = t[..., order]
        return t[..., order, :] if name in ("r", "d_r") else t

    inputs = {name: reorder(name, t, order) for name, t in inputs.items()}
    results = run_recurrence(case, inputs, "reference", through)
    return {name: reorder(name, t, order.argsort()) for name, t in results.items()}
