"""Rows as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .rows import Row


def duration(time_us: float) -> str:
    """Three digits with a unit: 9.31 us, 3.05 ms, 2.93 s."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if time_us >= 0.9995 * size:
            return f"{time_us / size:.3g} {unit}"
    return f"{time_us:.3g} us"


def size(amount_bytes: float) -> str:
    """Three digits with a unit: 1.5 MB, 3.22 GB."""
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6)):
        if amount_bytes >= 0.9995 * unit_bytes:
            return f"{amount_bytes / unit_bytes:.3g} {unit}"
    return f"{amount_bytes / 1e3:.3g} kB"


def ratio(slower_us: float, faster_us: float) -> str:
    """How many times faster: 0.94x, 3.2x, 41x."""
    value = slower_us / faster_us
    digits = 0 if value >= 9.95 else 1 if value >= 1.995 else 2
    return f"{value:.{digits}f}x"


def terminal_table(rows: Sequence[Row]) -> Table:
    """One line a variant, grouped by case; "ours is" compares the case's first variant of ours."""
    table = Table(title_justify="left", header_style="bold", expand=False)
    for name in ("case", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "p20 - p80", "ours is", "GB/s", "GFLOP/s", "% of roof", "error", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == case]
        ours = next((row for row in group if row.ours and row.measured), None)
        for index, row in enumerate(group):
            table.add_row(
                case if index == 0 else "",
                row.backend,
                *_cells(row, ours),
                style="bold" if row.ours else None,
                end_section=index == len(group) - 1,
            )
    return table


def _cells(row: Row, ours: Row | None) -> list[str]:
    accuracy = [f"{row.error:.1e}", f"{row.budget:.1e}"] if row.error == row.error else ["", ""]
    if not row.measured:
        return ["not timed", "", "", "", "", "", *accuracy]
    faster = "" if ours is None or row.ours else f"{ratio(row.time_us, ours.time_us)} faster"
    return [
        duration(row.time_us),
        f"{duration(row.p20_us)} - {duration(row.p80_us)}",
        faster,
        f"{row.bandwidth_gb_s:.3g}",
        f"{row.gflop_s:.3g}" if row.flops else "",
        row.bound if row.bound == "latency" else f"{row.roofline_percent:.0f} {row.bound}",
        *accuracy,
    ]
