"""Fused kernels for the xLSTM cells and for distillation losses.

Dimension key, here and everywhere: B batch, T time, H heads, D head dim (E: D as input of r),
K key dim, V value dim (vocabulary in losses), G gates in the order i f z o, S states in the order
h c n m, N rows (tokens).
"""

from . import nn
from .backends import available_backends
from .cells import LSTMState, MLSTMState, SLSTMState
from .ops.kl_div import kl_div
from .ops.linear_kl_div import linear_cross_entropy, linear_kl_div, linear_topk_kl_div
from .ops.mlstm import mlstm, mlstm_combine, mlstm_context_parallel
from .ops.mlstm_step import mlstm_step
from .ops.recurrence import lstm, slstm
from .ops.sliding_window_attention import (
    SlidingWindowCache,
    sliding_window_attention,
    sliding_window_attention_step,
    sliding_window_cache,
)
from .ops.topk_kl_div import XLSTM_RECIPE, topk_kl_div
from .replace import replace_layers, restore_layers

__version__ = "0.1.0"

__all__ = [
    "XLSTM_RECIPE",
    "LSTMState",
    "MLSTMState",
    "SLSTMState",
    "SlidingWindowCache",
    "available_backends",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_topk_kl_div",
    "lstm",
    "mlstm",
    "mlstm_combine",
    "mlstm_context_parallel",
    "mlstm_step",
    "nn",
    "replace_layers",
    "restore_layers",
    "sliding_window_attention",
    "sliding_window_attention_step",
    "sliding_window_cache",
    "slstm",
    "topk_kl_div",
]
