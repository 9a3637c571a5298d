"""Sliding-window attention's Triton kernels in small: every branch, fast enough to run while one
works."""

from __future__ import annotations

import pytest
import torch
from test_sliding_window_attention import DEVICES, check, make_inputs

import xlstm_kernels as xk
from xlstm_kernels.backends import UNAVAILABLE, Backend
from xlstm_kernels.ops.sliding_window_attention import triton as backend
from xlstm_kernels.ops.sliding_window_attention.shapes import SPAN, cut

pytestmark = pytest.mark.skipif(
    UNAVAILABLE[Backend.TRITON] is not None, reason=f"triton: {UNAVAILABLE[Backend.TRITON]}"
)
SMALL = {"B": 1, "T": 140, "H": 2, "G": 1, "D": 16, "E": 24}
CASES = [
    ({}, {"window": 40, "sinks": 3}),
    ({"B": 2, "T": 70, "G": 2}, {"window": 100, "sinks": 2}),
    ({"T": 130}, {"window": 1, "sinks": 70}),  # two blocks of first tokens
    ({"T": 90, "dtype": torch.bfloat16}, {"window": 30, "sinks": 1, "scale": 0.7}),
    ({"T": 90, "dtype": torch.float16, "layout": "strided"}, {"window": 30}),
    ({"T": 90, "layout": "head_first"}, {"window": 64, "sinks": 64}),
    ({"T": 100}, {"window": 9, "sinks": 4, "lengths": (30, 0, 69, 1)}),
    ({"T": 1}, {"window": 5, "sinks": 1}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES, ids=str)
def test_small_cases(sizes, options):
    check("triton", make_inputs(**{**SMALL, **sizes}), **options)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [None, (1500, 0, 1100)], ids=str)
def test_first_tokens_of_long_sequences(lengths):
    """Their gradients are summed over several spans of queries."""
    inputs = make_inputs(**{**SMALL, "T": 2600})
    check("triton", inputs, window=300, sinks=5, lengths=lengths)


def test_cuts():
    rows = cut([0, 2 * SPAN, 2 * SPAN, 2 * SPAN + 5], SPAN)
    assert rows == [[0, 2 * SPAN, 0, 0], [0, 2 * SPAN, SPAN, 0], [2 * SPAN, 5, 0, 2]]


def test_what_is_refused():
    x = torch.zeros(1, 3, 1, 300)
    assert backend.supports(x, x, x) == "D must be at most 256, got 300"
    assert "float64" in backend.supports(x.double(), x, x)


def test_second_derivatives_are_refused():
    device = DEVICES.get("triton", "cpu")
    q = torch.randn(1, 4, 1, 16, device=device, requires_grad=True)
    h = xk.sliding_window_attention(q, q, q, window=2, backend="triton")
    (dq,) = torch.autograd.grad(h.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()
