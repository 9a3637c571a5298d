"""A million tokens: bounded memory, float64's values and gradients, pieces as one pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

import xlstm_kernels as xk
from benchmarks import peak
from xlstm_kernels.ops.mlstm.shapes import saved_shapes, state_shapes
from xlstm_kernels.testing import relative_error

pytestmark = pytest.mark.slow

T, H, K, V = 1 << 20, 1, 16, 16
NEAR = 1e-5  # of the 2-norm; at these gates 4e-6 is the worst, df
PIECES = (1, 300_000, 65_536, T - 365_537)
# For any T: a thread's tiles and stack, the odd ends of huge pages.
SCRATCH_BYTES = 8 << 20


def tokens(gates: float | None = None) -> list[Tensor]:
    """q, k, v, i, f; forget gates around sigmoid(3), or all gates +-`gates`."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, H, size, generator=draw) for size in (K, K, V))
    i, f = torch.randn(1, T, H, generator=draw), torch.randn(1, T, H, generator=draw) + 3
    if gates is not None:
        i, f = gates * i.sign(), gates * (f - 3).sign()
    return [x.requires_grad_() for x in (q, k, v, i, f)]


def with_gradients(inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """h, last c and n, and the gradients of their weighted sum; the states weigh what h does."""
    h, last = xk.mlstm(*inputs)
    loss = (h * weight).sum() + (last.c * weight[0, : H * K]).sum() + last.n.sum()
    return [h, last.c, last.n, *torch.autograd.grad(loss, inputs)]


def weights() -> Tensor:
    return torch.randn(1, T, H, V, generator=torch.Generator().manual_seed(1))


def count_bytes(shapes) -> int:
    return sum(4 * torch.Size(shape).numel() for shape in shapes)


def bounded_memory(rank: int) -> dict[str, int]:
    """Bytes beyond the inputs: peaks of a forward and of a forward with backward; what is due."""
    inputs, weight = tokens(), weights()
    q, _, v, i, _ = inputs
    few = [x.detach()[:, :600].requires_grad_() for x in inputs]
    torch.autograd.grad(xk.mlstm(*few)[0], few, weight[:, :600])  # what is loaded and made once
    found = {}
    before = peak.forget()
    with torch.no_grad():
        xk.mlstm(*inputs)
    found["forward"] = peak.size_bytes() - before
    before = peak.forget()
    h, _ = xk.mlstm(*inputs)
    torch.autograd.grad(h, inputs, weight)
    found["both"] = peak.size_bytes() - before
    results = [v.shape, *state_shapes(1, q, v)]
    found["forward due"] = count_bytes(results)
    gradients = [x.shape for x in (q, q, v, i, i)]
    found["both due"] = count_bytes([*results, *gradients, *saved_shapes(q, v, None)])
    return found


def test_memory_is_that_of_the_results_and_the_saved_shapes():
    (found,) = run_on_ranks(1, bounded_memory)
    for what in ("forward", "both"):
        assert found[what] <= found[f"{what} due"] + SCRATCH_BYTES, found


def test_values_and_gradients_are_those_of_float64():
    inputs, weight = tokens(), weights()
    names = ["h", "c", "n", "dq", "dk", "dv", "di", "df"]
    got = dict(zip(names, with_gradients(inputs, weight), strict=True))
    double = [x.detach().double() for x in inputs]
    with torch.no_grad():  # plain torch, all the way
        h, last = xk.mlstm(*double, backend="reference", chunk_size=64)
    exact = dict(
        zip(
            names,
            with_gradients([x.requires_grad_() for x in double], weight.double()),
            strict=True,
        )
    )
    for name, plain in {"h": h, "c": last.c, "n": last.n}.items():
        assert relative_error(exact[name], plain) < 1e-12, name
    for name in names:
        assert relative_error(got[name], exact[name]) <= NEAR, name
        end = [x[name][:, -1000:] if name[0] in "hd" else x[name] for x in (got, exact)]
        assert relative_error(*end) <= NEAR, f"last tokens of {name}"


def test_pieces_are_one_pass():
    inputs = [x.detach() for x in tokens()]
    h, whole = xk.mlstm(*inputs)
    parts, state = [], None
    for piece in zip(*(x.split(PIECES, dim=1) for x in inputs), strict=True):
        part, state = xk.mlstm(*piece, state)
        parts.append(part)
    assert relative_error(torch.cat(parts, dim=1), h) <= NEAR
    for got, want in zip(state, whole, strict=True):
        assert relative_error(got, want) <= NEAR


@pytest.mark.parametrize("change", [lambda f: f, torch.abs, lambda f: -f.abs()])
def test_saturated_gates_stay_finite(change: Callable[[Tensor], Tensor]):
    """Forget gates of either sign, always open, always closed."""
    *inputs, f = (x.detach() for x in tokens(50.0))
    inputs = [x.requires_grad_() for x in (*inputs, change(f))]
    assert all(x.isfinite().all() for x in with_gradients(inputs, weights()))
