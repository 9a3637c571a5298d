"""Matrix products of the backends for GPUs: whether float32's may be of tf32, and the one over all
tokens that is left to torch."""

from __future__ import annotations

import torch
from torch import Tensor


def tf32_allowed() -> bool:
    """By torch.backends.cuda.matmul.allow_tf32 and what else sets it."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def multiply_outer(draw_BTGHD: Tensor, h_prev_BTHD: Tensor, dr_GHDE: Tensor) -> None:
    """dR = sum over tokens of draw h_prev^T, summed in float32."""
    draw_GHDN = draw_BTGHD.flatten(0, 1).permute(1, 2, 3, 0)
    h_prev_HNE = h_prev_BTHD.flatten(0, 1).transpose(0, 1)
    for draw_HDN, dr_HDE in zip(draw_GHDN, dr_GHDE, strict=True):
        if draw_HDN.dtype is dr_HDE.dtype:
            torch.bmm(draw_HDN, h_prev_HNE, out=dr_HDE)
        elif draw_HDN.device.type == "cuda":
            torch.bmm(draw_HDN, h_prev_HNE, out_dtype=dr_HDE.dtype, out=dr_HDE)
        else:
            torch.bmm(draw_HDN.to(dr_HDE.dtype), h_prev_HNE.to(dr_HDE.dtype), out=dr_HDE)
