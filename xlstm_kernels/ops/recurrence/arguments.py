"""How the compiled backends are told of a call's cell and sequences."""

from __future__ import annotations

from torch import Tensor

from ...arguments import token_starts
from ...cells import CELLS

CELL_INDEX = {cell: index for index, cell in enumerate(CELLS)}  # csrc/cells/list.h


def starts_of(cu_seqlens: Tensor | None, T: int, cell: str) -> Tensor | None:
    """`cu_seqlens` as kernels read it, its values checked where that does not stop a device; CUDA
    kernels stay inside the tensors anyhow."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        token_starts(CELLS[cell].function, cu_seqlens, T)
    return cu_seqlens.contiguous()
