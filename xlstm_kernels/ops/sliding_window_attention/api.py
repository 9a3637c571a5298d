"""Causal attention to the last tokens and the first ones, over sequences and a token at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...arguments import (
    check_is_integer,
    check_is_number,
    check_is_positive,
    check_tensor,
    count_sequences,
    token_starts,
)
from ...backends import Backend
from ...cells import no_autocast
from . import op, reference
from .shapes import Window


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each token to the last `window` tokens and the first `sinks`.

    Args:
        q: (B, T, H, D) queries, any float dtype and strides.
        k, v: (B, T, G, D) keys and (B, T, G, E) values, of q's dtype; H is a multiple of G, and
            query heads share keys in order (grouped-query attention).
        window: tokens that a token sees, itself among them: t sees j if t - window < j <= t.
        sinks: first tokens of a sequence that all later ones see.
        scale: of the scores; None is D ** -0.5.
        cu_seqlens: (S + 1,) int32 token offsets of S packed sequences, read on the host; B is then
            1. Each has sinks of its own.
        backend: "auto", or one of "reference", "cpu", "triton"; a named backend runs or raises.

    Returns:
        h (B, T, H, E) in q's dtype, with exact gradients by q, k and v. Time and memory grow
        linearly with T.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the named backend cannot run this call; the message says why.

    Source: window: Longformer, arXiv 2004.05150, section 3.1; sinks: arXiv 2309.17453.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> q, k, v = (torch.randn(2, 100, heads, 16) for heads in (4, 2, 2))
        >>> xk.sliding_window_attention(q, k, v, window=32, sinks=4).shape
        torch.Size([2, 100, 4, 16])
    """
    function = "sliding_window_attention"
    _check_heads(function, q, k, v, "BT")
    options = Window(*_check_window(function, window, sinks), _scale(function, q, scale))
    count_sequences(function, ("q", q), cu_seqlens)
    starts = None
    if cu_seqlens is not None:
        starts = token_starts(function, cu_seqlens, q.shape[1])
    chosen = op.SLIDING_WINDOW_ATTENTION.resolve(backend, q, k, v)
    with no_autocast(q.device):
        if chosen is Backend.TRITON:
            return KernelAttention.apply(chosen.value, (starts, *options), q, k, v)
        table = {Backend.REFERENCE: reference, **op.SLIDING_WINDOW_ATTENTION.table}
        return table[chosen].forward(q, k, v, options, starts)


class KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, call: tuple[Any, ...], *inputs: Tensor) -> Tensor:
        h, lse = op.forward(*inputs, *call, backend)
        ctx.backend, ctx.call = backend, call
        ctx.save_for_backward(*inputs, h, lse)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        grads = KernelAttentionGrad.apply(ctx.backend, ctx.call, dh, *ctx.saved_tensors)
        return (None, None, *grads)


class KernelAttentionGrad(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it is an error, not a zero."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, call: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.backend = backend
        return tuple(op.backward(*tensors, *call, backend))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"sliding_window_attention: backend {ctx.backend!r} has no second derivative;"
            " use backend='reference'"
        )


class SlidingWindowCache(NamedTuple):
    """Keys and values that the next token may see: k (B, sinks + window, G, D) and v (..., E), the
    first tokens in the first `sinks` places and the last ones in turn in the others; seen (B,)
    int64, the tokens so far."""

    k: Tensor
    v: Tensor
    seen: Tensor
    sinks: int


def sliding_window_cache(
    k: Tensor, v: Tensor, *, window: int, sinks: int = 0
) -> SlidingWindowCache:
    """The cache after a prompt, for `sliding_window_attention_step`; its size depends on T no more.

    Args:
        k, v: (B, T, G, D) keys and (B, T, G, E) values of the whole prompt; T may be 0.
        window, sinks: as in `xk.sliding_window_attention`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    function = "sliding_window_cache"
    _check_values(function, k, v, "BT", ("k", k))
    size, sinks = _check_window(function, window, sinks)
    B, T = k.shape[:2]
    kept = torch.arange(min(max(sinks, T - size), T), T, device=k.device)
    kept = torch.cat([torch.arange(min(sinks, T), device=k.device), kept])
    places = _places(kept, size, sinks)
    made = (x.new_zeros(B, sinks + size, *x.shape[2:]) for x in (k, v))
    k, v = (room.index_copy(1, places, x[:, kept]) for room, x in zip(made, (k, v), strict=True))
    return SlidingWindowCache(k, v, torch.full((B,), T, device=k.device), sinks)


def sliding_window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: SlidingWindowCache,
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, SlidingWindowCache]:
    """One token of each sequence after those in the cache, in plain torch.

    Args:
        q: (B, H, D); k: (B, G, D); v: (B, G, E), of one dtype.
        cache: from `xk.sliding_window_cache` or the step before.
        scale: as in `xk.sliding_window_attention`.
        inplace: the cache's own storage takes the token, and nothing of its size is copied;
            without gradients only.

    Returns:
        h (B, H, E), and the cache with this token.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    function = "sliding_window_attention_step"
    _check_heads(function, q, k, v, "B")
    scale = _scale(function, q, scale)
    B, G, D = k.shape
    slots, E = cache.k.shape[1], v.shape[2]
    check_tensor(function, "cache.k", cache.k, "(B, slots, G, D)", (B, slots, G, D), ("q", q))
    check_tensor(function, "cache.v", cache.v, "(B, slots, G, E)", (B, slots, G, E), ("q", q))
    tensors = (q, k, v, cache.k, cache.v)
    if inplace and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(f"{function}: inplace must be False where gradients are wanted, got True")
    count = _common_count(cache.seen) if inplace else None
    cache = _with_token(cache, k, v, inplace, count)
    keys, values, mask_B11S = cache.k, cache.v, None
    if count is None:
        mask_B11S = (torch.arange(slots, device=q.device) < cache.seen[:, None])[:, None, None]
    else:  # places are filled in their order
        keys, values = keys[:, : count + 1], values[:, : count + 1]
    with no_autocast(q.device):
        h_BHE = F.scaled_dot_product_attention(
            q[:, :, None],
            keys.transpose(1, 2).to(q.dtype),
            values.transpose(1, 2).to(q.dtype),
            mask_B11S,
            scale=scale,
            enable_gqa=q.shape[1] != G,
        )[:, :, 0]
    return h_BHE, cache


def _common_count(seen_B: Tensor) -> int | None:
    """What each row has seen, where that is one number and a look at it waits for no GPU. Neither
    indices nor a mask are needed then, which cost more than the attention."""
    if seen_B.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    counts = set(seen_B.tolist())
    return counts.pop() if len(counts) == 1 else None


def _with_token(
    cache: SlidingWindowCache, k: Tensor, v: Tensor, inplace: bool, count: int | None
) -> SlidingWindowCache:
    """`count` is that of `_common_count`."""
    sinks, window = cache.sinks, cache.k.shape[1] - cache.sinks
    if count is not None:
        at = count if count < sinks else sinks + (count - sinks) % window
        cache.k[:, at], cache.v[:, at] = k, v
        cache.seen.add_(1)
        return cache
    where = torch.arange(len(k), device=k.device), _places(cache.seen, window, sinks)
    put = Tensor.index_put_ if inplace else Tensor.index_put
    keys, values = (put(room, where, x.to(room.dtype)) for room, x in ((cache.k, k), (cache.v, v)))
    seen = cache.seen.add_(1) if inplace else cache.seen + 1
    return SlidingWindowCache(keys, values, seen, sinks)


def _places(t: Tensor, window: int, sinks: int) -> Tensor:
    return torch.where(t < sinks, t, sinks + (t - sinks) % window)


def _check_heads(function: str, q: Tensor, k: Tensor, v: Tensor, rows: str) -> None:
    _check_values(function, k, v, rows, ("q", q))
    letters = ", ".join((*rows, "H", "D"))
    H = q.shape[-2] if q.dim() == len(rows) + 2 else 0
    check_tensor(
        *(function, "q", q, f"({letters})", (*k.shape[:-2], H, k.shape[-1])),
        first=("k", k),
    )
    if k.shape[-2] == 0 or H % k.shape[-2]:
        raise ValueError(
            f"{function}: H must be a multiple of k's heads G = {k.shape[-2]}, got {H}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{function}: {name} must be of q's dtype {q.dtype}, got {x.dtype}")


def _check_values(
    function: str, k: Tensor, v: Tensor, rows: str, first: tuple[str, Tensor]
) -> None:
    """k (rows, G, D) and v (rows, G, E)."""
    for name, x in (first, ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    letters = ", ".join((*rows, "G"))
    if k.dim() != len(rows) + 2:
        raise ValueError(f"{function}: k must be ({letters}, D), got {tuple(k.shape)}")
    check_tensor(function, "k", k, f"({letters}, D)", tuple(k.shape), first)
    E = v.shape[-1] if v.dim() else 0
    check_tensor(function, "v", v, f"({letters}, E)", (*k.shape[:-1], E), first)


def _check_window(function: str, window: int, sinks: int) -> tuple[int, int]:
    check_is_positive(function, "window", window)
    check_is_integer(function, "sinks", sinks)
    if sinks < 0:
        raise ValueError(f"{function}: sinks must be at least 0, got {sinks}")
    return window, sinks


def _scale(function: str, q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    check_is_number(function, "scale", scale)
    return float(scale)
