"""The most memory that this process has held since it last asked: Linux alone tells."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from .problem import UnavailableError

PROCESS = Path("/proc/self")


def forget() -> int:
    """Sets the peak to what the process holds now, and returns that, in bytes."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError as error:
        raise UnavailableError(f"the peak of memory cannot be measured here: {error}") from error
    return _status_bytes("VmRSS")


def during(run: Callable[[], object]) -> int:
    """Bytes that a call holds at its peak beyond what the process held before it."""
    # What the C library keeps of memory that was freed would not show when it is used again.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = forget()
    results = run()
    peak = size_bytes() - before
    del results
    return peak


def size_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise UnavailableError(f"{PROCESS}/status has no {field}")
