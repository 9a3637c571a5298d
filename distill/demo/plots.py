"""The demo's figures."""

from functools import partial

from matplotlib.axes import Axes

from distill.plots import INK, svg

# Read on white and on near-black alike.
COLORS = {"teacher": "#8b93a1", "student": "#2f8fe0", "control": "#e0822f"}


def figures(metrics: dict) -> dict[str, str]:
    """Every figure of the report by name, as SVG text."""
    draw = {"curves": _curves, "files": _files, "speed": _speed, "size": _size}
    return {name: svg(name, partial(function, metrics=metrics)) for name, function in draw.items()}


def _curves(axes: Axes, metrics: dict) -> None:
    tokens_per_step = metrics["config"]["rows"] * metrics["config"]["length"]
    for name in ("teacher", "control", "student"):
        points = [p for p in metrics["curves"][name] if "heldout_bits_per_byte" in p]
        x = [p["step"] * tokens_per_step / 1e6 for p in points]
        y = [p["heldout_bits_per_byte"] for p in points]
        width = 1.2 if name == "teacher" else 2.0
        label = f"{name}, {y[-1]:.3f} at its end"
        axes.plot(x, y, color=COLORS[name], linewidth=width, marker="o", markersize=3, label=label)
    axes.set_xlabel("million tokens of training")
    axes.set_ylabel("bits per byte")
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    axes.legend(frameon=False)


def _files(axes: Axes, metrics: dict) -> None:
    files = sorted(metrics["files"], key=lambda file: file["control"] - file["student"])
    gains = [file["control"] - file["student"] for file in files]
    colors = [COLORS["student"] if gain > 0 else COLORS["control"] for gain in gains]
    axes.barh(range(len(gains)), gains, color=colors, height=0.72)
    axes.axvline(0, color=INK, linewidth=0.6)
    names = ["/".join(file["path"].split("/")[-2:]) for file in files]
    axes.set_yticks(range(len(names)), names, fontsize=min(9, 140 / len(names)))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("bits per byte: control minus student")
    axes.grid(axis="x")


def _speed(axes: Axes, metrics: dict) -> None:
    speed = metrics["speed"]
    names = ("eager torch", "our kernels")
    values = (speed["reference"]["tokens_per_s"], speed["ours"]["tokens_per_s"])
    bars = axes.barh(names, values, color=(COLORS["teacher"], COLORS["student"]), height=0.6)
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4, color=INK)
    axes.set_xlabel("tokens per second, training step of the student")
    axes.margins(x=0.18)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _size(axes: Axes, metrics: dict) -> None:
    for name, model in metrics["models"].items():
        x, y = model["parameters"] / 1e6, model["bits_per_byte"]
        axes.scatter([x], [y], s=90, color=COLORS[name])
        axes.annotate(
            f"{name} {y:.3f}",
            (x, y),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[name],
        )
    axes.margins(y=0.25)
    largest = max(model["parameters"] for model in metrics["models"].values())
    axes.set_xlim(0, 1.45 * largest / 1e6)
    axes.set_xlabel("million parameters")
    axes.set_ylabel("bits per byte, held out")
    axes.grid()
