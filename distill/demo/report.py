"""The demo's metrics as a table in the terminal, as JSON and as one self-contained web page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from distill.demo.results import judge
from distill.files import write_atomically
from distill.progress import seconds
from distill.report import figures, page
from distill.report.document import drawings, timing_table
from distill.report.plots import svg
from distill.report.run_folder import RunFolder

WHAT = {
    "teacher": "a transformer over bytes",
    "hybrid": "the teacher with mLSTM and window for attention, aligned and distilled",
    "teacher on": "control: the teacher, trained on as long as the hybrid was distilled",
    "small": "half of the teacher's layers, distilled",
    "small, labels": "control: the same weights and text, without the teacher",
}


def publish(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    """Write metrics.json and report.html into the folder, then print the table."""
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_atomically(folder / "report.html", render(metrics))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    heads, rows = summary(metrics)
    for at, head in enumerate(heads):
        table.add_column(head, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in sentences(metrics):
        console.print(sentence, soft_wrap=True, markup=False)
    console.print(f"report   {folder / 'report.html'}", soft_wrap=True, markup=False)


def summary(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each part: means over seeds, and how far they spread. It is the first seed's model
    that reads."""
    heads = ["held-out text", "bits per byte", "agrees with teacher", "parameters", "MB"]
    heads.append("tokens/s read")
    rows = []
    for part, models in metrics["parts"].items():
        bits = [model["bits_per_byte"] for model in models]
        agreement = [model["agreement"] for model in models]
        rows.append(
            [
                part,
                _spread(bits, "{:.3f}"),
                _spread(agreement, "{:.1%}"),
                f"{models[0]['parameters']:,}",
                f"{models[0]['bytes'] / 1e6:.1f}",
                f"{metrics['reading'][part]:,.0f}",
            ]
        )
    return heads, rows


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and half of the distance from the least to the most."""
    mean = form.format(sum(values) / len(values))
    return f"{mean} ± {form.format((max(values) - min(values)) / 2)}" if values[1:] else mean


def sentences(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What came of it, whichever way it went."""
    found, training = judge(metrics), metrics["training"]
    n = len(metrics["parts"]["hybrid"])
    yield (
        f"The hybrid takes {abs(found.change):.1%} {_more(found.change)} bits per byte than its"
        f" teacher and agrees with it {found.agreement:.1%} of the time (means of {n} seeds). The"
        f" teacher, trained on for as many steps, takes {abs(found.on):.1%} {_more(found.on)}."
    )
    gains = ", ".join(f"{gain:+.3f}" for gain in found.gains)
    yield (
        f"The small student is better than its control in {found.better} of {n} seeds: bits per"
        f" byte saved {gains}."
    )
    constant = "the same" if found.cache[0] == found.cache[1] else f"not {found.cache[0]:,}"
    yield (
        f"After {found.context:,} bytes the hybrid writes {found.decode:.1f} times as fast as its"
        f" teacher ({metrics['config']['sequences']} sequences at once); what it remembers are"
        f" {found.cache[1]:,} bytes, {constant} as at the start."
    )
    rates, name = training["tokens_per_s"], training["backend"]
    yield (
        f"A training step of the hybrid does {rates[name]:,.0f} tokens/s on backend={name!r} and"
        f" {rates['reference']:,.0f} in eager torch (backend='reference'): {training['ratio']:.1f}"
        f" times as fast, gradients equal within {training['parity']['error']:.1e}."
    )


def _more(change: float) -> str:
    return "more" if change > 0 else "less"


def render(metrics: Mapping[str, Any]) -> str:
    """The page."""
    found, config = judge(metrics), metrics["config"]
    run = RunFolder.read(Path(metrics["run"]))
    scores = {"gates": metrics["scores"]["gates"], "bench": metrics["scores"]["bench"]}
    scores["models"] = {name: {} for name in metrics["scores"]["bench"]["models"]}
    run = RunFolder(run.path, run.lines, scores, run.recipe, run.environment, {})
    colors = figures.colors_of(list(metrics["parts"]))
    parts = [f"<p>{html.escape(sentence)}</p>" for sentence in sentences(metrics)]
    parts.append(
        page.tiles(
            (
                (f"{found.change:+.1%}", "bits per byte, hybrid against teacher"),
                (f"{found.agreement:.1%}", "hybrid agrees with teacher"),
                (f"{found.better} of {len(found.gains)}", "seeds: distilled beats labels alone"),
                (f"{found.decode:.1f}x", f"teacher's writing speed after {found.context:,}"),
                (f"{metrics['training']['ratio']:.1f}x", "eager torch's training speed"),
            )
        )
    )
    heads, rows = summary(metrics)
    parts += ["<h2>Results on text that no model has seen</h2>", page.table(heads, rows)]
    meanings = "; ".join(f"{part}: {what}" for part, what in WHAT.items())
    parts.append(
        '<p class="soft">Means over seeds, which decide the order of the text, and half of their'
        f" range. Lower bits per byte are better. Tokens/s: {config['rows']} rows of"
        f" {config['length']}, no gradients. {html.escape(meanings)}.</p>"
    )
    for caption, draw in (
        ("Every seed", partial(_seeds, metrics=metrics, colors=colors)),
        ("Training step of the hybrid", partial(_speed, metrics=metrics)),
    ):
        figure = page.figure(caption, svg(caption, draw))
        parts.append(figure)
    parts[-2:] = [f'<div class="plots">{"".join(parts[-2:])}</div>']
    for title, plots in drawings(run):
        parts.append(f'<h2>{title}</h2><div class="plots">{"".join(plots)}</div>')
    timing = timing_table(metrics["scores"]["bench"])
    parts.append(page.table(timing.heads, timing.rows))
    parts.append(f'<p class="soft">{html.escape(timing.note)}</p>')
    parts += ["<h2>What the models write</h2>", _samples(metrics, colors)]
    parts += ["<h2>How this was made</h2>", page.definitions(_setup(metrics))]
    recipe = html.escape(run.recipe)
    parts.append(f"<details><summary>recipe of the hybrid</summary><pre>{recipe}</pre></details>")
    title = "A transformer became a recurrent hybrid, and a smaller model"
    return page.PAGE.substitute(title=title, body="\n".join(parts))


def _seeds(axes: Axes, metrics: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    parts = metrics["parts"]
    for at, (part, models) in enumerate(parts.items()):
        values = [model["bits_per_byte"] for model in models]
        axes.scatter(values, [at] * len(values), s=60, color=colors[part], alpha=0.75)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte, held out")
    axes.grid()


def _speed(axes: Axes, metrics: Mapping[str, Any]) -> None:
    rates = metrics["training"]["tokens_per_s"]
    names = ["eager torch", "our kernels"]
    values = [rates["reference"], rates[metrics["training"]["backend"]]]
    bars = axes.barh(names, values, color=(figures.TEACHER, figures.STUDENT), height=0.6)
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4)
    axes.set_xlabel("tokens per second")
    axes.margins(x=0.18)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _samples(metrics: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    parts = []
    for sample in metrics["samples"]:
        cards = "".join(
            f'<figure class="sample"><figcaption>{page.dot(colors[name])}{html.escape(name)}'
            f"</figcaption><pre><u>{html.escape(sample['prompt'])}</u>"
            f"{html.escape(sample[name])}</pre></figure>"
            for name in metrics["parts"]
        )
        parts.append(f'<div class="samples">{cards}</div>')
    return "".join(parts)


def _setup(metrics: Mapping[str, Any]) -> dict[str, str]:
    corpus, machine, config = metrics["corpus"], metrics["machine"], metrics["config"]
    budget = config["budget"]
    return {
        "Training text": f"{corpus['train_files']} files, {corpus['train_bytes'] / 1e6:.1f} MB",
        "Held-out text": f"{corpus['heldout_files']} files, {corpus['heldout_bytes'] / 1e3:.0f} kB",
        "Vocabulary": "bytes",
        "Steps": f"teacher {budget['teacher']}, hybrid {budget['align']} to align and"
        f" {budget['distill']} to distill, small {budget['small']}; {config['rows']} x"
        f" {config['length']} bytes each",
        "Loss": f"{config['ce_weight']:g} cross-entropy + {config['kl_weight']:g} KL(teacher ‖"
        " student)",
        "Hybrid": f"window {config['window']}, {config['sinks']} sinks",
        "Machine": f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}",
        "Software": f"xlstm_kernels {machine['xlstm_kernels']}, torch {machine['torch']}, Python"
        f" {machine['python']}, {machine['system']}",
        "Time": f"{seconds(metrics['wall_s'])}, {seconds(metrics['trained_s'])} of it training",
    }
