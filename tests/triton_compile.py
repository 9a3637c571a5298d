"""Compiles the Triton kernels of calls ahead of time, for chips that this machine need not have.

    python tests/triton_compile.py '{"target": ["cuda", 90, 32], "calls": [{"K": 128, ...}]}'

prints a JSON list with a row for each kernel: registers, spills, shared memory, instructions. It
runs in a process of its own, since Triton's interpreter, once on, compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    """What Triton asks of a device before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(target: GPUTarget, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kernel that `calls` launch, compiled once."""
    driver.set_active(Driver(target))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> None:
        binary = launch(kernel, *args, warmup=True, **options)
        flags = {k: v for k, v in options.items() if k.isupper() or k.startswith("num_")}
        row = rows.setdefault((kernel.__name__, binary.hash), {"kernel": kernel.__name__})
        row |= {"flags": flags, "shared": binary.metadata.shared, **usage(target, binary.asm)}

    JITFunction.run = compile_only
    for call in calls:
        RUNS[call.pop("op", "mlstm")](**call)
    return list(rows.values())


def usage(target: GPUTarget, asm: dict[str, Any]) -> dict[str, int]:
    if target.backend == "hip":
        found = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"]).group(1))
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        spills = found["vgpr_spill_count"]  # SGPRs spill into VGPRs
        return {"registers": found["vgpr_count"], "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    counts = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}
    counts |= {"async": r"cp\.async\.c[ag]"}
    counts |= {f"wide_{way}": rf"\b{way}\.global\S*\.v4" for way in ("ld", "st")}
    found = {name: len(re.findall(pattern, asm["ptx"])) for name, pattern in counts.items()}
    return {"registers": registers, "spills": stack + local, **found}


def run(
    dtype: str = "bfloat16",
    K: int = 128,
    V: int = 256,
    B: int = 1,
    T: int = 600,
    H: int = 1,
    packed: bool = False,
    split: bool = True,
    input_gate: str = "exp",
    normalizer: str = "max",
    backward: bool = True,
) -> None:
    """One forward and, where asked, backward pass of `xk.mlstm`."""
    from xlstm_kernels.ops.mlstm import triton as mlstm
    from xlstm_kernels.ops.mlstm import triton_launch

    triton_launch.BUSY_PROGRAMS = 256 if split else 0
    kind = getattr(torch, dtype)
    q, k, v = (torch.zeros(B, T, H, D, dtype=kind) for D in (K, K, V))
    i, f = torch.zeros(B, T, H), torch.zeros(B, T, H)
    state = (torch.zeros(B, H, K, V), torch.zeros(B, H, K), torch.zeros(B, H))
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    call = (cu_seqlens, input_gate, normalizer, 1.0, 1e-6, 0)
    h, c, n, m, *saved = mlstm.forward(q, k, v, i, f, *state, *call, True)
    if backward:
        mlstm.backward(h, c, n, m, q, k, v, i, f, saved, *call, True)


def step(
    dtype: str, c_dtype: str, K: int, V: int, T: int, kept: str, B: int = 2, H: int = 1
) -> None:
    """A call of `xk.mlstm_step` on a pool; which states are `kept`: "last", "save" or "all"."""
    from xlstm_kernels.ops.mlstm_step import triton as mlstm_step

    kind = getattr(torch, dtype)
    q, k, v = (torch.zeros(B, T, H, D, dtype=kind) for D in (K, K, V))
    i, f = torch.zeros(B, T, H), torch.zeros(B, T, H)
    c = torch.zeros(40, H, K, V, dtype=getattr(torch, c_dtype))
    call = (q, k, v, i, f, c, torch.zeros(40, H, K), torch.zeros(40, H))
    index, options = torch.arange(B), ("exp", "max", 1.0, 1e-6)
    if kept == "all":
        mlstm_step.forward(*call, index, True, *options)
    else:
        save = torch.arange(B, B + B * T).view(B, T) if kept == "save" else None
        mlstm_step.update(*call, torch.zeros_like(v), index, save, *options)


def recurrence(
    cell: str = "slstm",
    dtype: str = "bfloat16",
    D: int = 64,
    B: int = 3,
    T: int = 40,
    H: int = 2,
    packed: bool = False,
    some: bool = False,
    save: bool = True,
    backward: bool = True,
) -> None:
    """Forward and, where asked, backward passes of `xk.slstm` or `xk.lstm`; `some`: without bias,
    states and the gradients of r and b. Not `save`: one that saves nothing for a backward."""
    from xlstm_kernels.cells import CELLS
    from xlstm_kernels.ops.recurrence import triton as backend

    kind, S = getattr(torch, dtype), CELLS[cell].states
    B = 1 if packed else B
    x, r = torch.zeros(B, T, 4, H, D, dtype=kind), torch.zeros(4, H, D, D, dtype=kind)
    b, state = torch.zeros(4, H, D, dtype=kind), torch.zeros(S, B, H, D)
    starts = torch.tensor([0, T], dtype=torch.int32) if packed else None
    given = (x, r, None, None) if some else (x, r, b, state)
    h, last, *saved = backend.forward(*given, starts, cell, 0.0, save)
    if not (save and backward):
        return
    backend.forward(*given, starts, cell, 0.0, False)
    want = [not some] * 3
    dlast = None if some else last
    backend.backward(h, dlast, r, *saved, starts, cell, 0.0, None, x.new_empty(0), want)


def kl_div(
    dtype: str,
    V: int,
    B: int = 1,
    T: int = 16,
    words: int = 0,
    support: str = "tail",
    grad: str = "",
    split: bool = False,
    **options: Any,
) -> None:
    """A call of `xk.kl_div`, or of `xk.topk_kl_div` with this many words; `grad`: the dtype of the
    gradient, where it is not the student's; `split`: what a process does of split rows."""
    from xlstm_kernels.ops.kl_div import triton as dense
    from xlstm_kernels.ops.kl_div.options import Options
    from xlstm_kernels.ops.kl_div.ranks import PHASES, Shard, Split
    from xlstm_kernels.ops.topk_kl_div import triton as sparse

    student = torch.zeros(B, T, V, dtype=getattr(torch, dtype))
    labels = torch.zeros(B, T, dtype=torch.int64) if options.get("ce_weight") else None
    rest = (labels, None, *Options(**options))
    into = torch.zeros(B, T, V, dtype=getattr(torch, grad or dtype))
    shard = Shard(None, 0, (V,), (V,))  # type: ignore[arg-type]  # nobody is asked
    sums, z_words = (torch.zeros(B * T, size, dtype=torch.float64) for size in (14, words))
    for phase in range(1, len(PHASES)) if split else [0]:
        if words and PHASES[phase] == "mixed":
            continue  # its outcomes are few, and every process has them all
        how: dict[str, Any] = {"grad": into if PHASES[phase] in ("whole", "loss") else None}
        if split:
            how["split"] = Split(phase, sums, z_words, shard)
        if words:
            ids, logprobs = torch.zeros(B, T, words, dtype=torch.int64), torch.zeros(B, T, words)
            sparse._launch(student, logprobs, ids, None, *rest, support, **how)
        else:
            dense._launch(student, torch.zeros_like(student), *rest, **how)


def attention(
    dtype: str = "bfloat16",
    D: int = 128,
    E: int = 128,
    B: int = 1,
    T: int = 600,
    G: int = 2,
    sinks: int = 4,
    packed: bool = False,
) -> None:
    """Both passes of `xk.sliding_window_attention`."""
    from xlstm_kernels.ops.sliding_window_attention import triton as backend

    kind = getattr(torch, dtype)
    q, k, v = (torch.zeros(B, T, n, width, dtype=kind) for n, width in ((4, D), (G, D), (G, E)))
    options = ([0, T] if packed else None, 128, sinks, 1.0)
    h, lse = backend.forward(q, k, v, *options)
    backend.backward(h, q, k, v, h, lse, *options)


RUNS = {"mlstm": run, "mlstm_step": step, "recurrence": recurrence, "kl_div": kl_div}
RUNS |= {"attention": attention}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    rows = compiled(GPUTarget(*asked["target"]), asked["calls"])
    print(json.dumps(rows, default=str))  # a flag may be a function
