from .api import (
    SlidingWindowCache,
    sliding_window_attention,
    sliding_window_attention_step,
    sliding_window_cache,
)

__all__ = [
    "SlidingWindowCache",
    "sliding_window_attention",
    "sliding_window_attention_step",
    "sliding_window_cache",
]
