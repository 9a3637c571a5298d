"""The most memory that this process has held since it last asked: Linux alone tells."""

from __future__ import annotations

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


def size_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise UnavailableError(f"{PROCESS}/status has no {field}")
