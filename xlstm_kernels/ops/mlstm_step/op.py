"""Schemas, fakes and backends of one step of the mLSTM."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from . import cpu

MLSTM_STEP = Op("mlstm_step", {Backend.CPU: cpu})

_TOKEN = "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f"
_OPTIONS = "str input_gate, str normalizer, float scale, float eps"


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    *options: Any,
) -> list[Tensor]:
    dtype = compute_dtype(q.dtype)
    return [v.new_empty(v.shape), *(x.new_empty(x.shape, dtype=dtype) for x in (c, n, m))]


def _fake_update(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return v.new_empty(v.shape)


# Returns h and the next state (c, n, m).
forward = define(
    MLSTM_STEP,
    f"mlstm_step_forward({_TOKEN}, Tensor c, Tensor n, Tensor m, {_OPTIONS}, str backend)"
    " -> Tensor[]",
    _fake_forward,
)
# Returns h; c, n and m become the next state.
update = define(
    MLSTM_STEP,
    f"mlstm_step_update({_TOKEN}, Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, {_OPTIONS},"
    " str backend) -> Tensor",
    _fake_update,
)
