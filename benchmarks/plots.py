"""Speed-ups and percent of the ceiling as one SVG per machine and table; cost over T."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .entries import Entry, family
from .problem import FORWARD
from .scaling import Point
from .table import ratio

INK, FAINT = "#24292f", "#d0d7de"
PEER_COLORS = {
    "eager": "#1f6feb",
    "torch.compile": "#d29922",
    "nn.LSTM": "#8957e5",
    "transformers": "#bf3989",
    "mlstm_kernels": "#57606a",
}
OURS_COLOR = "#2da44e"
CEILING_COLORS = {"memory": "#2da44e", "compute": "#1b7c83"}
CEILING_NAMES = {"memory": "of copy bandwidth", "compute": "of the sgemm rate"}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",  # the same numbers give the same file
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
}


def draw(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Writes the figure: left, times faster than each peer; right, percent of the ceiling."""
    peers = [name for name in PEER_COLORS if any(name in entry.peers for entry in entries)]
    lines = sum(max(1, len(entry.peers)) for entry in entries)
    with matplotlib.rc_context(STYLE):
        height = 1.5 + 0.16 * lines + 0.22 * len(entries)
        figure = Figure(figsize=(10.0, height), layout="constrained")
        faster, share = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _speed_ups(faster, entries, peers)
        _shares(share, entries)
        faster.set_yticks(range(len(entries)), [entry.label for entry in entries])
        faster.set_ylim(len(entries) - 0.45, -0.55)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def _speed_ups(axes: Axes, entries: Sequence[Entry], peers: Sequence[str]) -> None:
    for name in peers:
        places, values, labels = [], [], []
        for index, entry in enumerate(entries):
            if name not in entry.peers:
                continue
            width = 0.8 / len(entry.peers)
            offset = (list(entry.peers).index(name) - (len(entry.peers) - 1) / 2) * width
            places.append((index + offset, width))
            values.append(entry.speed_up(name))
            labels.append(ratio(entry.peers[name].time_us, entry.ours.time_us))
        heights = [0.86 * width for _, width in places]
        # Bars start at 1, so that one that points left is slower than its peer.
        bars = axes.barh(
            [y for y, _ in places],
            [value - 1 for value in values],
            heights,
            left=1,
            color=PEER_COLORS[name],
            label=name,
        )
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xscale("log")
    low = min([1.0, *(entry.speed_up(name) for entry in entries for name in entry.peers)])
    high = max([2.0, *(entry.speed_up(name) for entry in entries for name in entry.peers)])
    axes.set_xlim(low * 0.75, high * 1.9)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.grid(axis="x")
    axes.set_xlabel("times faster than")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=max(1, len(peers)), frameon=False)


def _shares(axes: Axes, entries: Sequence[Entry]) -> None:
    for bound, color in CEILING_COLORS.items():
        chosen = [(i, e.ours) for i, e in enumerate(entries) if e.ours.bound == bound]
        if not chosen:
            continue
        values = [row.roofline_percent for _, row in chosen]
        bars = axes.barh(
            [i for i, _ in chosen], values, 0.5, color=color, label=CEILING_NAMES[bound]
        )
        axes.bar_label(bars, [f"{value:.0f} %" for value in values], padding=3, fontsize=8)
    highest = max(
        (e.ours.roofline_percent for e in entries if e.ours.bound in CEILING_COLORS), default=0
    )
    axes.set_xlim(0, max(112.0, 1.15 * highest))
    axes.axvline(100, color=INK, linewidth=0.9)
    axes.grid(axis="x")
    axes.set_xlabel("percent of the ceiling measured in the same run")
    if highest:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def draw_scaling(points: Sequence[Point], title: str, path: Path) -> None:
    """Writes the figure: left, time over T; right, the peak of memory beyond the inputs."""
    with matplotlib.rc_context(STYLE | {"axes.spines.left": True}):
        figure = Figure(figsize=(10.0, 4.0), layout="constrained")
        time, memory = figure.subplots(1, 2)
        _over_T(time, points, lambda point: point.time_us / 1e3, "ms a call")
        _over_T(memory, points, lambda point: point.peak_bytes / 1e6, "MB beyond the inputs, peak")
        time.legend(loc="upper left", frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def tokens(T: float) -> str:
    """1 k, 64 k, 1 M."""
    return f"{T / 2**20:g} M" if T >= 2**20 else f"{T / 2**10:g} k"


def _over_T(
    axes: Axes, points: Sequence[Point], value: Callable[[Point], float], label: str
) -> None:
    for name, way in dict.fromkeys((point.backend, point.direction) for point in points):
        line = [p for p in points if (p.backend, p.direction) == (name, way) and p.passes]
        color = PEER_COLORS.get(family(name), OURS_COLOR)
        axes.plot(
            [point.T for point in line],
            [value(point) for point in line],
            marker="o",
            markersize=3.5,
            linestyle="-" if way == FORWARD else "--",
            color=color,
            label=f"{'ours' if color == OURS_COLOR else name}, {way}",
        )
    # Slope 1: twice the tokens, twice the cost.
    first, last = min(point.T for point in points), max(point.T for point in points)
    low = min(value(point) for point in points) / 2
    axes.plot([first, last], [low, low * last / first], color=INK, linewidth=0.8, linestyle=":")
    axes.annotate("linear", (last, low * last / first / 1.5), fontsize=8, ha="right", va="top")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda T, _: tokens(T))
    axes.set_xlabel("T")
    axes.set_ylabel(label)
    axes.grid()
