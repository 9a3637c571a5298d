"""Plots, and the README's tables between their markers, from each machine's last full run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import plots
from .entries import Entry, entries, family
from .rows import Row, newest_complete, read
from .table import duration, ratio

# Marker in the README: the operations of its table.
GROUPS = {
    "speed-mlstm": ("mlstm", "mlstm_step"),
    "speed-recurrence": ("slstm", "lstm"),
    "speed-kl_div": ("kl_div",),
}
TITLES = {
    "speed-mlstm": "mLSTM",
    "speed-recurrence": "Recurrent cells",
    "speed-kl_div": "KL divergence with its gradient, temperature 2",
}
NOT_MEASURED = "Not measured yet.\n"
CEILINGS = {"memory": "copy", "compute": "sgemm"}


def write(results: Path, readme: Path) -> list[Path]:
    """Returns the files written. Without results, or without the markers in the README, nothing is
    written: ValueError."""
    if not any(results.glob("*/*.csv")):
        raise ValueError(f"--results: {results} holds no measurement; `run` makes one")
    text = readme.read_text()
    for marker in GROUPS:
        fill(text, marker, "")  # all markers are there, before anything is written
    written = []
    for marker, ops in GROUPS.items():
        parts = []
        for folder in sorted(path for path in results.glob("*") if path.is_dir()):
            rows = [row for op in ops for row in _last_run(folder / f"{op}.csv")]
            if not rows:
                continue
            plot = folder / f"{marker}.svg"
            title = f"{TITLES[marker]} on {rows[0].device} {rows[0].machine}"
            if found := entries(rows):
                plots.draw(found, title, plot)
                written.append(plot)
                where = Path(os.path.relpath(plot, readme.parent)).as_posix()
                parts.append(f"![{title}]({where})\n")
            parts.append(markdown(rows, found))
        text = fill(text, marker, "\n".join(parts) or NOT_MEASURED)
    readme.write_text(text)
    return [*written, readme]


def fill(text: str, marker: str, content: str) -> str:
    """`text` with `content` between the two markers; ValueError when they are not there."""
    begin, end = f"<!-- BEGIN GENERATED: {marker} -->", f"<!-- END GENERATED: {marker} -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the README lacks the markers {begin} ... {end}; put them where it goes")
    return f"{head}{begin}\n{content}{end}{tail}"


def markdown(rows: Sequence[Row], found: Sequence[Entry]) -> str:
    """A table with a line per variant of ours, what was not timed, and how it was measured."""
    peers = list(dict.fromkeys(name for entry in found for name in entry.peers))
    header = ["operation", "ours", *peers, "of the ceiling", "error / budget"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for entry in found:
        row = entry.ours
        lines.append(
            _line(
                [
                    entry.label.replace("\n", "<br>"),
                    f"**{duration(row.time_us)}**",
                    *(_against(entry, peer) for peer in peers),
                    f"{row.roofline_percent:.0f} % {CEILINGS[row.bound]}"
                    if row.bound in CEILINGS
                    else "",
                    f"{row.error:.0e} / {row.budget:.0e}",
                ]
            )
        )
    runs = dict.fromkeys(_conditions(row) for row in rows)
    settings = {row.backend for row in rows if not row.ours and row.measured}
    note = ["Of a peer with several settings, the fastest.  "] if len(settings) > len(peers) else []
    return "\n".join([*lines, "", *note, *_missing(rows), *runs, ""])


def _missing(rows: Sequence[Row]) -> list[str]:
    """A line for each reason why a peer, or one of ours, was not timed."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            cases.setdefault((family(row.backend), row.reason), []).append(row.case)
    return [
        f"Not timed: {name}, {found[0] if len(found) == 1 else f'{len(found)} rows'}: {reason}  "
        for (name, reason), found in cases.items()
    ]


def _against(entry: Entry, peer: str) -> str:
    if peer not in entry.peers:
        return ""
    time_us = entry.peers[peer].time_us
    return f"{duration(time_us)} ({ratio(time_us, entry.ours.time_us)})"


def _conditions(row: Row) -> str:
    changes = " with local changes" if row.dirty else ""
    return (
        f"<sub>{row.device} measurement, {row.date[:10]}: {row.machine}, {row.threads} threads,"
        f" {row.isa} kernels, torch {row.torch}, Python {row.python}, commit {row.commit}{changes}."
        f" Medians of calls timed in turn; in brackets, how many times faster ours is."
        f" Ceilings of the same run: copy {row.copy_gb_s:.3g} GB/s,"
        f" sgemm {row.sgemm_gflop_s:.3g} GFLOP/s."
        f" Load before it: {row.load}.</sub>  "
    )


def _last_run(path: Path) -> list[Row]:
    return newest_complete(read(path)) if path.exists() else []


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
