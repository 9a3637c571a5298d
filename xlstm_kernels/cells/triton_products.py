"""Products of tiles in Triton, with float32 sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    """a b. DOT: the operands' precision; "bf16_emulated" is "bf16" in the interpreter, whose own
    product of bfloat16 is wrong."""
    if DOT == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif DOT == "bf16_emulated":
        a = a.to(tl.bfloat16).to(tl.float32)
        return tl.dot(a, b.to(tl.bfloat16).to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=DOT)
