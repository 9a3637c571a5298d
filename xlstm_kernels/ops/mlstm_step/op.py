"""Schemas, fakes and backends of a few steps of the mLSTM."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...library import define
from . import cpu, triton
from .shapes import next_shapes, state_dtypes

MLSTM_STEP = Op("mlstm_step", {Backend.CPU: cpu, Backend.TRITON: triton})

_TOKENS = "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f"
_OPTIONS = "str input_gate, str normalizer, float scale, float eps, str backend"


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    state_index: Tensor | None,
    all_states: bool,
    *options: Any,
) -> list[Tensor]:
    shapes, dtypes = next_shapes(q, v, all_states), state_dtypes(q, c)
    after = (q.new_empty(shape, dtype=d) for shape, d in zip(shapes, dtypes, strict=True))
    return [v.new_empty(v.shape), *after]


def _fake_update(*call: Any) -> None:
    pass


# Returns h and the next state (c, n, m), or that after each token.
forward = define(
    MLSTM_STEP,
    f"mlstm_step_forward({_TOKENS}, Tensor c, Tensor n, Tensor m, Tensor? state_index,"
    f" bool all_states, {_OPTIONS}) -> Tensor[]",
    _fake_forward,
)
# c, n and m, or the named rows of them, become the next state; h is filled.
update = define(
    MLSTM_STEP,
    f"mlstm_step_update({_TOKENS}, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, Tensor(d!) h,"
    f" Tensor? state_index, Tensor? save_index, {_OPTIONS}) -> ()",
    _fake_update,
)
