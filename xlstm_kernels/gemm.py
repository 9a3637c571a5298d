"""Matrix products on CPU tensors whose result is not rounded to the factors' dtype.

torch's own product of bfloat16 matrices is a bfloat16 matrix. MKL, inside the torch of x86-64, has
one with a float32 result at the speed of the other; where it is missing, factors become float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .backends import torch_symbol

# Of cblas.h.
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What `multiply` wants factors of `dtype` to be converted to, without loss."""
    if dtype == torch.bfloat16 and _bf16_gemm() is not None:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, accumulate: bool) -> None:
    """out = a b, or out += a b. The factors are of one `product_dtype`; out, of rows side by side
    or further apart, is float32, or float64 for float64 factors, or of the factors' dtype."""
    if a_MK.dtype != torch.bfloat16 or out_MN.dtype == torch.bfloat16:
        if accumulate:
            torch.addmm(out_MN, a_MK, b_KN, out=out_MN)
        else:
            torch.mm(a_MK, b_KN, out=out_MN)
        return
    (M, K), N = a_MK.shape, b_KN.shape[1]
    if M == 0 or N == 0:
        return
    if not accumulate:  # faster than beta = 0: that path of MKL writes past the caches
        out_MN.zero_()
    a_MK, transposed_a, stride_a = _factor(a_MK)
    b_KN, transposed_b, stride_b = _factor(b_KN)
    gemm = _bf16_gemm()
    assert gemm is not None  # product_dtype has seen to it
    gemm(
        *(_ROW_MAJOR, transposed_a, transposed_b, M, N, K),
        *(1.0, a_MK.data_ptr(), stride_a, b_KN.data_ptr(), stride_b),
        *(1.0, out_MN.data_ptr(), max(out_MN.stride(0), N)),
    )


def _factor(matrix: Tensor) -> tuple[Tensor, int, int]:
    """The matrix, copied if need be, whether it is stored transposed, and its rows' distance."""
    for stored, transposed in ((matrix, _PLAIN), (matrix.mT, _TRANSPOSED)):
        rows, columns = stored.shape
        if (columns == 1 or stored.stride(1) == 1) and (rows == 1 or stored.stride(0) >= columns):
            return matrix, transposed, max(stored.stride(0), columns)
    return matrix.contiguous(), _PLAIN, matrix.shape[1]


@cache
def _bf16_gemm() -> Callable[..., None] | None:
    address = torch_symbol("cblas_gemm_bf16bf16f32")
    if not address:
        return None
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    matrix = pointer, integer
    return ctypes.CFUNCTYPE(None, *(integer,) * 6, number, *matrix, *matrix, number, *matrix)(
        address
    )
