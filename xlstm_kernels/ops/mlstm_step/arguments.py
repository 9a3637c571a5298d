"""What `xk.mlstm_step` asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import check_is_tensor, check_tensor
from ...cells import MLSTMState, compute_dtype
from ..mlstm.arguments import check_state
from .shapes import MAX_TOKENS, token_count

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Of k, v and the gates, by the number of q's axes: a step is short enough for formatting to count.
LETTERS = {
    3: ("(B, H, K)", "(B, H, V)", "(B, H)"),
    4: ("(B, T, H, K)", "(B, T, H, V)", "(B, T, H)"),
}


def check_call(
    tokens: Tokens,
    state: tuple[Tensor, ...],
    inplace: bool,
    state_index: Tensor | None,
    save_index: Tensor | None,
    all_states: bool,
    out: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; nothing here reads a tensor's values."""
    q, _, v, *_ = tokens
    _check_tokens(*tokens)
    (B, *_, H, K), V = q.shape, v.shape[-1]
    if state_index is None:
        check_state("mlstm_step", state, ((B, H, K, V), (B, H, K), (B, H)), ("q", q))
    else:
        _check_index("state_index", state_index, "(B,)", (B,), q)
        pooled = isinstance(state, (tuple, list)) and state and isinstance(state[0], Tensor)
        P = max(1, state[0].shape[0]) if pooled and state[0].dim() else 1
        check_state("mlstm_step", state, ((P, H, K, V), (P, H, K), (P, H)), ("q", q), rows="P")
    if save_index is not None:
        if state_index is None or not inplace:
            raise ValueError(
                "mlstm_step: save_index must be None without state_index and inplace=True, which"
                f" are {'None' if state_index is None else 'given'} and {inplace}"
            )
        letters = "(B, T)" if q.dim() == 4 else "(B,)"
        _check_index("save_index", save_index, letters, tuple(q.shape[:-2]), q)
    if all_states and inplace:
        raise ValueError(
            "mlstm_step: all_states must be False with inplace=True, got True; rows of a pool for"
            " the state after each token go into save_index"
        )
    if inplace or state_index is not None:
        _check_rows(state, compute_dtype(q.dtype), "inplace=True" if inplace else "state_index")
    if out is not None:
        _check_out(out, q, v)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> None:
    check_is_tensor("mlstm_step", "q", q)
    check_is_tensor("mlstm_step", "v", v)
    if q.dim() not in (3, 4) or 0 in q.shape[-2:] or not 1 <= token_count(q) <= MAX_TOKENS:
        raise ValueError(
            f"mlstm_step: q must be (B, H, K) or (B, T, H, K), T from 1 to {MAX_TOKENS}, none of H"
            f" and K 0, got {tuple(q.shape)}"
        )
    keys, values, gates = LETTERS[q.dim()]
    shape, V = tuple(q.shape), v.shape[-1] if v.dim() else 0
    if V == 0:
        raise ValueError(f"mlstm_step: v must be {values}, V not 0, got {tuple(v.shape)}")
    first, rows = ("q", q), shape[:-1]
    for name, x, letters, wanted in (
        ("q", q, "", shape),
        ("k", k, keys, shape),
        ("v", v, values, (*rows, V)),
        ("i", i, gates, rows),
        ("f", f, gates, rows),
    ):
        check_tensor("mlstm_step", name, x, letters, wanted, first)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"mlstm_step: {name} must have q's dtype {q.dtype}, got {x.dtype}")


def _check_index(name: str, index: Tensor, letters: str, shape: tuple[int, ...], q: Tensor) -> None:
    check_is_tensor("mlstm_step", name, index)
    if index.dtype not in (torch.int32, torch.int64) or index.shape != shape:
        raise ValueError(
            f"mlstm_step: {name} must be {letters} = {shape} int32 or int64, got"
            f" {tuple(index.shape)} {index.dtype}"
        )
    if index.device != q.device:
        raise ValueError(f"mlstm_step: {name} must be on q's device {q.device}, got {index.device}")


def _check_rows(state: tuple[Tensor, ...], dtype: torch.dtype, why: str) -> None:
    """Where kernels read and write the caller's own rows, nothing converts them."""
    for field, part in zip(MLSTMState._fields, state, strict=True):
        halved = field == "c" and dtype == torch.float32
        if part.dtype != dtype and not (halved and part.dtype == torch.bfloat16):
            wanted = f"{dtype} or torch.bfloat16" if halved else dtype
            raise TypeError(
                f"mlstm_step: state.{field} must be {wanted} with {why}, got {part.dtype}"
            )
        if not _has_dense_rows(part):
            raise ValueError(
                f"mlstm_step: state.{field} must have contiguous rows that do not overlap with"
                f" {why}, got strides {part.stride()} of {tuple(part.shape)}"
            )


def _has_dense_rows(part: Tensor) -> bool:
    if part.is_contiguous():
        return True
    row_elements = part.numel() // part.shape[0]
    return part[0].is_contiguous() and part.stride(0) >= row_elements


def _check_out(out: Tensor, q: Tensor, v: Tensor) -> None:
    check_tensor("mlstm_step", "out", out, LETTERS[q.dim()][1], tuple(v.shape), ("q", q))
    if out.dtype != q.dtype:
        raise TypeError(f"mlstm_step: out must have q's dtype {q.dtype}, got {out.dtype}")
    if not out.is_contiguous():
        raise ValueError(f"mlstm_step: out must be contiguous, got strides {out.stride()}")


def read_rows(state_index: Tensor, rows: int) -> list[int]:
    """Values of `state_index`, checked against the `rows` of a pool."""
    return _in_pool("state_index", state_index.tolist(), rows)


def kept_rows(
    state_index: Tensor, save_index: Tensor | None, tokens: int, rows: int
) -> tuple[list[int], list[int]]:
    """Rows of a pool that are read (B) and those that take the state after each token (B T).

    No two states may go to one row, nor one to a row that another sequence reads.
    """
    read = read_rows(state_index, rows)
    if save_index is None:
        kept = [row if t == tokens else -1 for row in read for t in range(1, tokens + 1)]
    else:
        saved = save_index.tolist()
        flat = saved if save_index.dim() == 1 else [row for each in saved for row in each]
        _in_pool("save_index", flat, rows)
        kept = [row if read[at // tokens] >= 0 else -1 for at, row in enumerate(flat)]
    owner: dict[int, int] = {}
    for at, row in enumerate(kept):
        if row >= 0 and owner.setdefault(row, at // tokens) != at // tokens:
            _refuse(save_index, f"row {row} for sequences {owner[row]} and {at // tokens}")
    if len(owner) != sum(row >= 0 for row in kept):
        _refuse(save_index, "a row for two tokens of a sequence")
    for b, row in enumerate(read):
        if owner.get(row, b) != b:
            _refuse(save_index, f"row {row} of sequence {owner[row]}, which sequence {b} reads")
    return read, kept


def _in_pool(name: str, values: list[int], rows: int) -> list[int]:
    if values and max(values) >= rows:
        raise ValueError(
            f"mlstm_step: {name} must be below the {rows} rows of state, got {max(values)}"
        )
    return values


def _refuse(save_index: Tensor | None, got: str) -> None:
    name = "state_index" if save_index is None else "save_index"
    raise ValueError(
        f"mlstm_step: {name} must give each state a row of its own with inplace=True, got {got}"
    )
