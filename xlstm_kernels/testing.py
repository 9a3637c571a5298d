"""The error measure and budgets that every backend is held to; shipped, so users can check an install.

The oracle is the float64 reference on the same (already rounded) inputs. A result may be off by twice
the error of plain torch in that dtype plus four rounding steps, in the 2-norm of each tensor; NaN fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Budget = PLAIN_FACTOR * rel(plain torch in that dtype) + EPS_FACTOR * eps(dtype).
PLAIN_FACTOR = 2.0
EPS_FACTOR = 4.0
# float64 against itself: plain torch is the oracle there, so its own rounding is all that is left.
# The sum over T steps of B*D products each rounds in another order; 64 eps covers T = 257, D = 256.
EPS_FACTOR_FLOAT64 = 64.0


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in 2-norms; |got| where exact is zero. NaN and inf stay visible."""
    got, exact = got.detach().double(), exact.detach().double()
    difference, size = (got - exact).norm(), exact.norm()
    return (difference / size if size > 0 else difference).item()


def budget(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Largest relative error allowed for a result of `dtype`, given plain torch's result."""
    factor = EPS_FACTOR_FLOAT64 if dtype == torch.float64 else EPS_FACTOR
    return PLAIN_FACTOR * relative_error(plain, exact) + factor * torch.finfo(dtype).eps


def check(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Raises AssertionError unless `got` is as close to `exact` as its dtype allows.

    Args:
        got: the result under test.
        exact: the float64 reference's result on the same inputs.
        plain: the reference's result in the dtype of `got`'s inputs, which earns the budget.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    error, allowed = relative_error(got, exact), budget(plain, exact, got.dtype)
    assert error <= allowed, f"{name}: relative error {error:.2e}, budget {allowed:.2e}"
