"""Time and memory of the mLSTM over T: each point in a fresh process, see point.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .machine import ROOT, Machine
from .problem import FORWARD, FORWARD_BACKWARD

# One head: at T = 1 M q, k, v and h alone are 3 GB, and the backward holds twice that.
SIZES = {"H": 1, "K": 128, "V": 256}
QUICK_SIZES = {"H": 1, "K": 16, "V": 24}
LENGTHS = tuple(1 << n for n in range(10, 21, 2))
QUICK_LENGTHS = (128, 256)
NAME = "scaling"  # of its results, and of its place in the README
OURS = "cpu"
# Variants of the mLSTM's cases, and the longest sequence that each is run on.
VARIANTS = {OURS: LENGTHS[-1], "eager, chunks of 64": 1 << 16}


@dataclass(frozen=True)
class Point:
    """peak_bytes: the most that one call held beyond its inputs, results among it. error, budget:
    of the last tokens' results."""

    date: str
    backend: str
    direction: str
    dtype: str
    shape: str
    T: int
    time_us: float
    peak_bytes: int
    error: float
    budget: float
    device: str
    machine: str
    threads: int
    isa: str
    torch: str
    python: str
    commit: str
    dirty: bool
    load: float

    @property
    def passes(self) -> bool:
        return self.error <= self.budget  # false for NaN


def measure(date: str, machine: Machine, longest: int, quick: bool) -> Iterator[Point]:
    """In the order of T; RuntimeError where a process fails."""
    sizes = QUICK_SIZES if quick else SIZES
    for T in QUICK_LENGTHS if quick else LENGTHS:
        for variant, variant_longest in VARIANTS.items():
            for direction in (FORWARD, FORWARD_BACKWARD):
                if variant_longest >= T and longest >= T:
                    yield _point(date, machine, variant, direction, T, sizes)


def _point(
    date: str, machine: Machine, variant: str, direction: str, T: int, sizes: dict[str, int]
) -> Point:
    call = {"variant": variant, "direction": direction, "T": T, "threads": machine.threads} | sizes
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.point", json.dumps(call)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{variant} {direction} at T = {T}: {reason}")
    described = dataclasses.asdict(machine)
    return Point(
        date=date,
        backend=variant,
        direction=direction,
        dtype="f32",
        shape=" ".join(f"{axis}{size}" for axis, size in ({"B": 1} | sizes).items()),
        T=T,
        machine=described.pop("name"),
        **json.loads(done.stdout),
        **described,
    )
