"""Plots, and the README's tables between their markers, from each machine's last full run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from . import plots, scaling
from .entries import Entry, entries, family
from .rows import Row, newest_complete, read
from .scaling import Point
from .table import duration, ratio, size

# Marker in the README: the operations of its table.
GROUPS = {
    "speed-mlstm": ("mlstm", "mlstm_step"),
    "speed-recurrence": ("slstm", "lstm"),
    "speed-kl_div": ("kl_div", "topk_kl_div"),
    "speed-linear_kl_div": ("linear_kl_div", "linear_topk_kl_div", "linear_cross_entropy"),
    "speed-attention": ("sliding_window_attention",),
    "speed-replace": ("replace",),
}
TITLES = {
    "speed-mlstm": "mLSTM",
    "speed-recurrence": "Recurrent cells",
    "speed-kl_div": "Losses over logits, with the gradient",
    "speed-linear_kl_div": "Losses from hidden states, with all gradients",
    "speed-attention": "Sliding-window attention",
    "speed-replace": "Models before and after replace_layers",
}
# Whose tables say what memory a call takes, too.
MEMORY = {"speed-linear_kl_div", "speed-attention", "speed-replace"}
NOT_MEASURED = "Not measured yet.\n"
HOW_SCALING = "Each point in a process of its own; memory is the peak beyond the inputs."
CEILINGS = {"memory": "copy", "compute": "sgemm"}


def write(results: Path, readme: Path) -> list[Path]:
    """Returns the files written. Without results, or without the markers in the README, nothing is
    written: ValueError."""
    if not any(results.glob("*/*.csv")):
        raise ValueError(f"--results: {results} holds no measurement; `run` makes one")
    text = readme.read_text()
    for marker in (*GROUPS, scaling.NAME):
        fill(text, marker, "")  # all markers are there, before anything is written
    written: list[Path] = []
    folders = sorted(path for path in results.glob("*") if path.is_dir())
    for marker, ops in GROUPS.items():
        parts = []
        for folder in folders:
            rows = [row for op in ops for row in _last_run(folder / f"{op}.csv")]
            if not rows:
                continue
            plot = folder / f"{marker}.svg"
            title = f"{TITLES[marker]} on {rows[0].device} {rows[0].machine}"
            if found := entries(rows):
                plots.draw(found, title, plot)
                written.append(plot)
                parts.append(_image(plot, title, readme))
            parts.append(markdown(rows, found, marker in MEMORY))
        text = fill(text, marker, "\n".join(parts) or NOT_MEASURED)
    parts = []
    for folder in folders:
        if points := _last_points(folder / f"{scaling.NAME}.csv"):
            plot = folder / f"{scaling.NAME}.svg"
            first = points[0]
            title = f"mLSTM over T, {first.shape}, on {first.device} {first.machine}"
            plots.draw_scaling(points, title, plot)
            written.append(plot)
            parts += [_image(plot, title, readme), scaling_markdown(points)]
    text = fill(text, scaling.NAME, "\n".join(parts) or NOT_MEASURED)
    readme.write_text(text)
    return [*written, readme]


def _image(plot: Path, title: str, readme: Path) -> str:
    return f"![{title}]({Path(os.path.relpath(plot, readme.parent)).as_posix()})\n"


def fill(text: str, marker: str, content: str) -> str:
    """`text` with `content` between the two markers; ValueError when they are not there."""
    begin, end = f"<!-- BEGIN GENERATED: {marker} -->", f"<!-- END GENERATED: {marker} -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the README lacks the markers {begin} ... {end}; put them where it goes")
    return f"{head}{begin}\n{content}{end}{tail}"


def markdown(rows: Sequence[Row], found: Sequence[Entry], memory: bool = False) -> str:
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
                    f"**{duration(row.time_us)}**{_peak(row, memory)}",
                    *(_against(entry, peer, memory) for peer in peers),
                    f"{row.roofline_percent:.0f} % {CEILINGS[row.bound]}"
                    if row.bound in CEILINGS
                    else "",
                    f"{row.error:.0e} / {row.budget:.0e}",
                ]
            )
        )
    runs = dict.fromkeys(_conditions(row, _how(row)) for row in rows)
    settings = {row.backend for row in rows if not row.ours and row.measured}
    note = ["Of a peer with several settings, the fastest.  "] if len(settings) > len(peers) else []
    return "\n".join([*lines, "", *note, *_missing(rows), *runs, ""])


def scaling_markdown(points: Sequence[Point]) -> str:
    """A line for each T: time, time of a token and peak of memory, ours and the peers'."""
    columns = dict.fromkeys((point.backend, point.direction) for point in points)
    names = [f"{'ours' if name == scaling.OURS else name}, {way}" for name, way in columns]
    lines = [_line(["T", *names]), _line(["---:"] * (len(names) + 1))]
    for T in sorted({point.T for point in points}):
        cells = []
        for column in columns:
            here = [p for p in points if p.T == T and (p.backend, p.direction) == column]
            cells.append(_scaling_cell(here[0]) if here else "")
        lines.append(_line([plots.tokens(T), *cells]))
    return "\n".join([*lines, "", _conditions(points[0], HOW_SCALING), ""])


def _scaling_cell(point: Point) -> str:
    if not point.passes:
        return f"error {point.error:.0e}, budget {point.budget:.0e}"
    each = duration(point.time_us / point.T)
    return f"{duration(point.time_us)}, {each} a token, {size(point.peak_bytes)}"


def _missing(rows: Sequence[Row]) -> list[str]:
    """A line for each peer, or variant of ours, and each kind of reason why it was not timed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.reason:
            kind = row.reason.partition(":")[0]
            found.setdefault((family(row.backend), kind), []).append(row)
    lines = []
    for (name, _), those in found.items():
        where = those[0].case if len(those) == 1 else f"{len(those)} rows"
        reasons = dict.fromkeys(row.reason for row in those)
        first = next(iter(reasons))
        example = "" if len(reasons) == 1 else "for one, "
        lines.append(f"Not timed: {name}, {where}: {example}{first}  ")
    return lines


def _against(entry: Entry, peer: str, memory: bool) -> str:
    if peer not in entry.peers:
        return ""
    row = entry.peers[peer]
    faster = ratio(row.time_us, entry.ours.time_us)
    return f"{duration(row.time_us)} ({faster}){_peak(row, memory)}"


def _peak(row: Row, wanted: bool) -> str:
    return f"<br>{size(row.peak_bytes)}" if wanted and row.peak_bytes == row.peak_bytes else ""


def _conditions(row: Row | Point, how: str) -> str:
    changes = " with local changes" if row.dirty else ""
    return (
        f"<sub>{row.device} measurement, {row.date[:10]}: {row.machine}, {row.threads} threads,"
        f" {row.isa} kernels, torch {row.torch}, Python {row.python}, commit {row.commit}{changes}."
        f" {how} Load before it: {row.load}.</sub>  "
    )


def _how(row: Row) -> str:
    return (
        "Medians of calls timed in turn; in brackets, how many times faster ours is."
        f" Ceilings of the same run: copy {row.copy_gb_s:.3g} GB/s,"
        f" sgemm {row.sgemm_gflop_s:.3g} GFLOP/s."
    )


def _last_points(path: Path) -> list[Point]:
    points = read(path, Point) if path.exists() else []
    last = max((point.date for point in points), default="")
    return [point for point in points if point.date == last]


def _last_run(path: Path) -> list[Row]:
    return newest_complete(read(path, Row)) if path.exists() else []


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
