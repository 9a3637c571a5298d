"""What each cell computes in one step, in plain torch, and the names of its gates and states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import lstm, slstm
from .lstm import LSTMState
from .mlstm import MLSTMState
from .slstm import SLSTMState

__all__ = ["CELLS", "Cell", "LSTMState", "MLSTMState", "SLSTMState"]

STATES = (LSTMState, MLSTMState, SLSTMState)
# What torch.save and torch.export.save have written of a layer that takes or returns a state, their
# loaders read once this package is imported. For the second torch's own error message names a
# function that is not public; no public one does it, hence the question: without it, all but saving
# works.
torch.serialization.add_safe_globals(list(STATES))
if register := getattr(pytree, "_register_namedtuple", None):
    for kind in STATES:
        register(kind, serialized_type_name=f"xlstm_kernels.{kind.__name__}")


@dataclass(frozen=True)
class Cell:
    """`step(raw_BGHD, state, n_floor)` takes and returns the states in the order of `State`.

    `function` is the public function that runs the cell.
    """

    function: str
    State: type[SLSTMState] | type[LSTMState]
    step: Callable[[Tensor, tuple[Tensor, ...], float], tuple[Tensor, ...]]

    @property
    def states(self) -> int:
        return len(self.State._fields)


# The same names, in the same order, as csrc/cells/list.h.
CELLS: dict[str, Cell] = {
    "slstm": Cell("slstm", SLSTMState, slstm.step),
    "slstm_exp": Cell("slstm", SLSTMState, slstm.step_exp),
    "lstm": Cell("lstm", LSTMState, lstm.step),
}

GATES = ("i", "f", "z", "o")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates, states and accumulators: float32, except for float64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Asked here: torch.compile cannot trace the question before torch 2.13. The meta device has none.
AUTOCASTS = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of `device`."""
    return device.type in AUTOCASTS and torch.is_autocast_enabled(device.type)


def no_tokens(h: Tensor, *inputs: Tensor | None) -> Tensor:
    """h of no token, which requires a gradient where one of the inputs does, as any other h."""
    return h + sum(x.flatten()[:0].sum() for x in inputs if x is not None)


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast switched off where it is on."""
    if not autocasts(device):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
