"""A few steps of the mLSTM in plain torch, any float dtype: cells/mlstm.py in the compute dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...cells import compute_dtype, no_autocast
from ...cells.mlstm import MLSTMState, Options, step
from .arguments import Tokens, kept_rows, read_rows
from .shapes import state_dtypes, token_count


def forward(
    tokens: Tokens,
    state: MLSTMState,
    state_index: Tensor | None,
    all_states: bool,
    options: Options,
) -> tuple[Tensor, MLSTMState]:
    """h in q's dtype and the next state, or that after each token."""
    if state_index is not None:
        if _has_values(state_index):
            read_rows(state_index, state.c.shape[0])
        state = MLSTMState(*(_rows(part, state_index) for part in state))
    h_BTHV, after = _steps(tokens, state, state_index, options)
    if not all_states:
        after = after[-1:]
    parts = zip(*after, strict=True)
    if all_states and tokens[0].dim() == 4:
        return h_BTHV, MLSTMState(*(torch.stack(part, dim=1) for part in parts))
    return h_BTHV, MLSTMState(*(part for (part,) in parts))


def update(
    tokens: Tokens,
    state: MLSTMState,
    state_index: Tensor | None,
    save_index: Tensor | None,
    options: Options,
) -> Tensor:
    """h; the state, or the named rows of it, becomes the next one."""
    if state_index is None:
        h_BTHV, after = forward(tokens, state, None, False, options)
        for part, new in zip(state, after, strict=True):
            part.copy_(new)
        return h_BTHV
    if _has_values(state_index):
        kept_rows(state_index, save_index, token_count(tokens[0]), state.c.shape[0])
    h_BTHV, after = forward(tokens, state, state_index, save_index is not None, options)
    if save_index is None:
        kept = state_index
    else:
        no_state = (state_index < 0).view(-1, *(1,) * (save_index.dim() - 1))
        kept = save_index.masked_fill(no_state, -1).flatten()
    for part, new in zip(state, after, strict=True):
        _keep(part, kept, new.reshape(-1, *part.shape[1:]))
    return h_BTHV


def _steps(
    tokens: Tokens, state: MLSTMState, state_index: Tensor | None, options: Options
) -> tuple[Tensor, list[MLSTMState]]:
    """h, and the state after each token in the dtypes that it is stored in."""
    q = tokens[0]
    dtype, stored = compute_dtype(q.dtype), state_dtypes(q, state.c)
    h_T, after = [], []
    with no_autocast(q.device):
        inputs = [x.to(dtype).unsqueeze(1) if q.dim() == 3 else x.to(dtype) for x in tokens]
        current = MLSTMState(*(part.to(dtype) for part in state))
        rows: Iterator[Tokens] = zip(*(x.unbind(1) for x in inputs), strict=True)
        for token in rows:
            h_BHV, current = step(*token, current, options)
            h_T.append(h_BHV)
            after.append(current)
    if state_index is not None:  # a sequence without a state has none after, and h = 0
        h_T = [_where(state_index >= 0, h) for h in h_T]
        after = [MLSTMState(*(_where(state_index >= 0, x) for x in parts)) for parts in after]
    after = [
        MLSTMState(*(part.to(d) for part, d in zip(parts, stored, strict=True))) for parts in after
    ]
    h_BTHV = h_T[0] if q.dim() == 3 else torch.stack(h_T, dim=1)
    return h_BTHV.to(q.dtype), after


def _has_values(index: Tensor) -> bool:
    """Whether they can be looked at: not while compiling, nor without waiting for a GPU."""
    return index.device.type == "cpu" and not torch.compiler.is_compiling()


def _where(condition_B: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition_B.view(-1, *(1,) * (x.dim() - 1)), x, torch.zeros_like(x))


def _rows(part: Tensor, index: Tensor) -> Tensor:
    return part[index.clamp(min=0)]


def _keep(part: Tensor, index_N: Tensor, new: Tensor) -> None:
    """part[index] = new where index is not negative; no shape depends on its values."""
    if index_N.shape[0] == 0:
        return
    kept_N = index_N >= 0
    # The others repeat what the first of them writes, or write back row 0.
    numbers_N = torch.arange(index_N.shape[0], device=index_N.device)
    source_N = torch.where(kept_N, numbers_N, kept_N.int().argmax())
    new = torch.where(kept_N.any(), new[source_N], part[:1])
    part.index_put_((index_N[source_N].clamp(min=0),), new)
