"""Figures as inline SVG that takes its ink from the page, in light and in dark."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stands for the page's text colour until the SVG is written.
INK = "#010203"

# Any: matplotlib 3.11 and newer spell out the names of their settings as the keys' type.
STYLE: dict[Any, object] = {
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.color": INK,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "text.parse_math": False,  # names are names, whatever is in them
    "lines.solid_capstyle": "round",
}


def svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = (5.4, 3.3)) -> str:
    """A figure as SVG text; `name` is unique within its page."""
    # The salt keeps the ids of several figures in one page apart, and the same in every run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"(font: [0-9.]+px) [^;\"]+", r"\1 system-ui, sans-serif", text)
    given = re.search(r'width="([0-9.]+)pt" height="([0-9.]+)pt"', text)
    return text.replace(given.group(0), 'role="img"', 1) if given else text
