"""Backends of sliding-window attention. All of them are torch's own products and kernels, which
compile, trace and differentiate themselves: there is no schema."""

from __future__ import annotations

from ...backends import Backend, Op
from . import cpu

SLIDING_WINDOW_ATTENTION = Op("sliding_window_attention", {Backend.CPU: cpu})
