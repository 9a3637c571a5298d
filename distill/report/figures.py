"""The figures of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from distill.evaluation.recovery import WinAndTie
from distill.report.plots import INK
from distill.report.run_folder import Curve, RunFolder

# Read on white and on near-black alike.
TEACHER, STUDENT = "#8b93a1", "#2f8fe0"
OTHERS = ("#e0822f", "#3aa66f", "#a06be0", "#d64f70", "#b59b1f")


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Teacher, student, controls, in this order."""
    return {
        name: (TEACHER, STUDENT, *OTHERS)[at % (len(OTHERS) + 2)] for at, name in enumerate(names)
    }


def losses(axes: Axes, run: RunFolder, stage: str) -> None:
    """Every part of a stage's loss, unweighted."""
    names = run.names("losses", stage)
    curves = {name: run.curve("losses", name, stage=stage) for name in names}
    if not names:
        curves = {"loss": run.curve("loss", stage=stage)}
    for at, (name, curve) in enumerate(curves.items()):
        color = (STUDENT, *OTHERS)[at % (len(OTHERS) + 1)]
        axes.plot(_millions(curve), curve.values, color=color, label=name, linewidth=1.6)
    values = [value for curve in curves.values() for value in curve.values]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        _log_scale(axes)
    axes.set_ylabel("loss, each part by itself")
    _over_tokens(axes)


def heldout(
    axes: Axes, runs: Mapping[str, RunFolder], name: str, label: str, teacher: float | None
) -> None:
    """A held-out value of the run and its controls, with the teacher's where it has one."""
    for (run_name, run), color in zip(runs.items(), (STUDENT, *OTHERS), strict=False):
        curve = run.curve("heldout", name)
        if curve.values:
            axes.plot(
                _millions(curve),
                curve.values,
                color=color,
                marker="o",
                markersize=3,
                label=f"{run_name}, {curve.values[-1]:.3f} at its end",
            )
    if teacher is not None:
        axes.axhline(teacher, color=TEACHER, linewidth=1.2, label=f"teacher, {teacher:.3f}")
    axes.set_ylabel(label)
    _over_tokens(axes)


def recovery(axes: Axes, found: WinAndTie) -> None:
    """A bar a task, worst on top."""
    names = list(found.recovery)[::-1]
    values = [found.recovery[name] for name in names]
    colors = [STUDENT if value >= 1 else OTHERS[0] for value in values]
    axes.barh(range(len(names)), values, color=colors, height=0.72)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=min(9, 170 / len(names)))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("of the teacher's score")
    axes.grid(axis="x")


def win_and_tie(axes: Axes, found: Mapping[str, WinAndTie]) -> None:
    """C_alpha over alpha, with alpha* where it passes one half."""
    most = max([0.1, *(needed for each in found.values() for needed in each.needed.values())])
    alphas = [most * 1.05 * step / 200 for step in range(201)]
    for (name, each), color in zip(found.items(), (STUDENT, *OTHERS), strict=False):
        label = f"{name}: alpha* {each.alpha_star:.3f}"
        shares = [each.share(alpha) for alpha in alphas]
        axes.step(alphas, shares, where="post", color=color, label=label)
        axes.plot([each.alpha_star], [each.share(each.alpha_star)], "o", color=color, markersize=6)
    axes.axhline(0.5, color=INK, linewidth=0.6, linestyle="--")
    axes.set_ylim(0, 1.04)
    axes.set_xlim(left=-0.01 * most)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("alpha: what may be lost of the teacher's score")
    axes.set_ylabel("tasks won or tied")
    axes.grid()
    axes.legend(frameon=False, loc="lower right")


def gates(axes: Axes, by_layer: Mapping[str, Sequence[float]]) -> None:
    """Mean output gate: layers down, heads across."""
    layers = sorted(by_layer, key=int)
    image = axes.imshow(
        [by_layer[layer] for layer in layers], cmap="viridis", vmin=0, vmax=1, aspect="auto"
    )
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label("0 window, 1 mLSTM")
    bar.outline.set_visible(False)
    axes.set_yticks(range(len(layers)), layers)
    heads = len(by_layer[layers[0]])
    axes.set_xticks(range(0, heads, max(1, heads // 8)))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")


def over_context(
    axes: Axes,
    bench: Mapping[str, Any],
    colors: Mapping[str, str],
    key: str,
    label: str,
    scale: float = 1.0,
) -> None:
    """A measured value of each model over the length of what it has read."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    for name, rows in bench["models"].items():
        contexts = [row["context"] for row in rows]
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=8)
        values = [row[key] * scale for row in rows]
        axes.plot(contexts, values, color=colors[name], marker="o", markersize=4, label=name)
    _log_scale(axes)
    if key == "decode_ms" and bench.get("crossover") is not None:
        axes.axvline(bench["crossover"], color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("tokens read before")
    axes.set_ylabel(label)
    axes.grid()
    axes.legend(frameon=False)


def _log_scale(axes: Axes) -> None:
    """Of values, with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _millions(curve: Curve) -> list[float]:
    return [tokens / 1e6 for tokens in curve.tokens]


def _over_tokens(axes: Axes) -> None:
    axes.set_xlabel("million tokens of training")
    axes.grid(axis="y")
    axes.legend(frameon=False)
