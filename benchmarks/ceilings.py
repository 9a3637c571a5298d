"""The rates this machine reaches, measured in the same run as the cases they are the ceiling of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .timing import Subject, interleave

CACHE_BYTES = 2 << 20  # the second level of today's server cores; what fits is timed warm


@dataclass(frozen=True)
class Ceilings:
    """Each from the 20th percentile of its times.

    copy_gb_s: read plus write of a large `copy_` into mapped memory. sgemm_gflop_s: the better of
    two float32 square matmuls. fresh_clone_gb_s: read plus write of a large `clone()`, whose pages
    are new; the difference to copy_gb_s is what a result in fresh memory pays for page faults.
    """

    copy_gb_s: float
    sgemm_gflop_s: float
    fresh_clone_gb_s: float

    def bound(self, flops: int, moved_bytes: int) -> tuple[str, float]:
        """Which ceiling holds this much work longer, "memory" or "compute", and the time in us.

        Work that fits in a cache is bound by neither: ("latency", NaN).
        """
        if moved_bytes < CACHE_BYTES:
            return "latency", math.nan
        memory_us = moved_bytes / self.copy_gb_s / 1e3
        compute_us = flops / self.sgemm_gflop_s / 1e3
        return ("memory", memory_us) if memory_us >= compute_us else ("compute", compute_us)


def measure(quick: bool = False) -> Ceilings:
    elements = (4 << 20) if quick else (64 << 20)
    sizes = (256,) if quick else (1024, 2048)
    budget_s = 0.1 if quick else 3.0
    source, target = torch.ones(elements), torch.ones(elements)
    squares = {size: (torch.randn(size, size), torch.randn(size, size)) for size in sizes}
    products = {size: torch.zeros(size, size) for size in sizes}

    subjects = [
        Subject("copy", lambda: target.copy_(source)),
        Subject("clone", lambda: source.clone()),
    ]
    for size, (a, b) in squares.items():
        out = products[size]
        subjects.append(Subject(f"sgemm {size}", lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    times = interleave(subjects, budget_s)

    moved_bytes = 2 * source.nbytes
    return Ceilings(
        copy_gb_s=moved_bytes / times["copy"].p20_us / 1e3,
        sgemm_gflop_s=max(2 * size**3 / times[f"sgemm {size}"].p20_us / 1e3 for size in sizes),
        fresh_clone_gb_s=moved_bytes / times["clone"].p20_us / 1e3,
    )
