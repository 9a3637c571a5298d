"""Matrix products whose result is not rounded to the factors' dtype.

torch's own product of bfloat16 matrices is a bfloat16 matrix. One with a float32 result, at the
speed of the other, is torch's `out_dtype`, which CUDA and ROCm have, and on CPU tensors a function
of MKL, inside the torch of x86-64. Where there is none, factors become float32; so do float16 ones
everywhere, whose gradients would leave float16's range. Products of float32 on a GPU are what torch
makes of them: TF32 where `torch.backends.cuda.matmul.allow_tf32` says so.
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


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What `multiply` wants factors of `dtype` on `device` to be converted to, without loss."""
    if dtype == torch.bfloat16 and _widens(device.type):
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
    elif out_MN.device.type == "cpu":
        _multiply_bf16(out_MN, a_MK, b_KN, accumulate)
    elif accumulate:
        torch.addmm(out_MN, a_MK, b_KN, out_dtype=out_MN.dtype, out=out_MN)
    else:
        torch.mm(a_MK, b_KN, out_dtype=out_MN.dtype, out=out_MN)


def _multiply_bf16(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, accumulate: bool) -> None:
    """On CPU tensors, into float32."""
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


def _widens(kind: str) -> bool:
    """Whether a device of this kind has a product of bfloat16 matrices with a float32 result."""
    if kind == "cpu":
        return _bf16_gemm() is not None
    # Looked up, not tried: that would launch work, and perhaps into a graph that is captured.
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmm.dtype_out", kind.upper())


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
