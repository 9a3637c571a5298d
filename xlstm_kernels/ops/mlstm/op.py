"""Schemas, fakes and backends of the mLSTM.

What forward saves belongs to the operation (shapes.py), so a backward on another backend agrees.
"""

from __future__ import annotations

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from . import cpu, triton
from .shapes import saved_shapes, sequences, state_shapes

MLSTM = Op("mlstm", {Backend.CPU: cpu, Backend.TRITON: triton})

_OPTIONS = "str input_gate, str normalizer, float scale, float eps, int chunk_size"


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
    chunk_size: int,
    save: bool,
    backend: str,
) -> list[Tensor]:
    saved = saved_shapes(q, v, cu_seqlens) if save else ()
    shapes = *state_shapes(sequences(q, cu_seqlens), q, v), *saved
    dtype = compute_dtype(q.dtype)
    return [v.new_empty(v.shape), *(q.new_empty(shape, dtype=dtype) for shape in shapes)]


def _fake_backward(
    dh: Tensor | None,
    dc: Tensor | None,
    dn: Tensor | None,
    dm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    saved: list[Tensor],
    cu_seqlens: Tensor | None,
    input_gate: str,
    normalizer: str,
    scale: float,
    eps: float,
    chunk_size: int,
    want_state: bool,
    backend: str,
) -> list[Tensor]:
    dtype = compute_dtype(q.dtype)
    gates = (q.new_empty(i.shape, dtype=dtype) for _ in range(2))
    shapes = state_shapes(sequences(q, cu_seqlens), q, v)
    states = (q.new_empty(shape if want_state else (0,), dtype=dtype) for shape in shapes)
    return [*(x.new_empty(x.shape) for x in (q, k, v)), *gates, *states]


# Returns h and the last state (c, n, m), and with `save` what shapes.py lists.
forward = define(
    MLSTM,
    "mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n,"
    f" Tensor? m, Tensor? cu_seqlens, {_OPTIONS}, bool save, str backend) -> Tensor[]",
    _fake_forward,
)
# Returns dq, dk, dv, di, df, and dc, dn, dm of the initial state (empty unless wanted).
backward = define(
    MLSTM,
    "mlstm_backward(Tensor? dh, Tensor? dc, Tensor? dn, Tensor? dm, Tensor q, Tensor k, Tensor v,"
    " Tensor i, Tensor f, Tensor[] saved, Tensor? cu_seqlens,"
    f" {_OPTIONS}, bool want_state, str backend) -> Tensor[]",
    _fake_backward,
)
