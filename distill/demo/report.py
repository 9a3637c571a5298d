"""A demo's metrics as a table in the terminal, as JSON and as one self-contained web page."""

import html
import json
import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from distill.checkpoint import write_atomically
from distill.demo.page import PAGE
from distill.demo.plots import COLORS, figures
from distill.demo.results import Verdict, judge
from distill.progress import rate, seconds


def publish(metrics: dict, run_dir: Path, console: Console) -> None:
    """Write RUN_DIR/metrics.json and RUN_DIR/report.html, then print the table."""
    write_atomically(run_dir / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_atomically(run_dir / "report.html", render(metrics))
    print_table(metrics, console)
    console.print(f"report   {run_dir / 'report.html'}", soft_wrap=True, markup=False)


# title, cell(model) -> text
ROWS = (
    ("bits per byte", lambda m: f"{m['bits_per_byte']:.3f}"),
    ("agrees with teacher", lambda m: f"{m['agreement']:.1%}"),
    ("parameters", lambda m: f"{m['parameters']:,}"),
    ("megabytes", lambda m: f"{m['bytes'] / 1e6:.2f}"),
    ("training steps", lambda m: f"{m['steps']}"),
    ("training, tokens/s", lambda m: rate(m["train_tokens_per_s"])),
    ("reading, tokens/s", lambda m: rate(m["score_tokens_per_s"])),
    ("writing, tokens/s", lambda m: rate(m["write_tokens_per_s"])),
)


def print_table(metrics: dict, console: Console) -> None:
    """The results, then what they amount to in two sentences."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2))
    table.add_column("held-out text")
    for name in metrics["models"]:
        table.add_column(name, justify="right", min_width=9)
    for title, cell in ROWS:
        table.add_row(title, *(cell(model) for model in metrics["models"].values()))
    console.print(table)
    for sentence in (quality_sentence(judge(metrics)), speed_sentence(metrics)):
        console.print(sentence, soft_wrap=True, markup=False)


def quality_sentence(verdict: Verdict) -> str:
    """What distillation was worth, with its uncertainty, whichever way it went."""
    word = "better" if verdict.gain > 0 else "worse"
    text = (
        f"The student is {abs(verdict.gain):.3f} bits per byte {word} than its control "
        f"(95% over files: {verdict.low:+.3f} to {verdict.high:+.3f}), "
        f"better on {verdict.files_better} of {verdict.files} held-out files"
    )
    if verdict.gain > 0 and not math.isnan(verdict.gap_closed):
        text += f"; that is {verdict.gap_closed:.0%} of the way from control to teacher"
    return text + "."


def speed_sentence(metrics: dict) -> str:
    """Ours against eager, in one run on one machine."""
    speed = metrics["speed"]
    ours, reference = speed["ours"], speed["reference"]
    return (
        f"A training step of the student does {ours['tokens_per_s']:,.0f} tokens/s on "
        f"backend={ours['backend']!r} and {reference['tokens_per_s']:,.0f} in eager torch "
        f"(backend='reference'): {speed['ratio']:.1f} times as fast, gradients equal within "
        f"{speed['parity']['error']:.1e}."
    )


def render(metrics: dict) -> str:
    """The report page."""
    models, verdict = metrics["models"], judge(metrics)
    share = models["student"]["parameters"] / models["teacher"]["parameters"]
    tiles = (
        (f"{models['student']['bits_per_byte']:.3f}", "bits per byte, student"),
        (f"{verdict.gain:+.3f}", "bits per byte saved against the control"),
        (f"{share:.0%}", "of the teacher's parameters"),
        (f"{metrics['speed']['ratio']:.1f}x", "the speed of eager torch, training step"),
    )
    return PAGE.substitute(
        quality=html.escape(quality_sentence(verdict)),
        speed=html.escape(speed_sentence(metrics)),
        tiles="".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in tiles),
        table=_table(metrics),
        samples=_samples(metrics),
        setup=_setup(metrics),
        **{f"figure_{name}": svg for name, svg in figures(metrics).items()},
    )


def _table(metrics: dict) -> str:
    models = metrics["models"]
    head = "".join(f'<th><i style="background:{COLORS[name]}"></i>{name}</th>' for name in models)
    rows = []
    for title, cell in ROWS:
        cells = "".join(f"<td>{html.escape(cell(model))}</td>" for model in models.values())
        rows.append(f"<tr><th>{html.escape(title)}</th>{cells}</tr>")
    parts = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<table class="lead">{parts}</table>'


def _samples(metrics: dict) -> str:
    parts = []
    for sample in metrics["samples"]:
        cards = "".join(
            f'<figure class="sample"><figcaption><i style="background:{COLORS[name]}"></i>{name}'
            f"</figcaption><pre><u>{html.escape(sample['prompt'])}</u>"
            f"{html.escape(sample[name])}</pre></figure>"
            for name in metrics["models"]
        )
        parts.append(f'<div class="samples">{cards}</div>')
    return "".join(parts)


def _setup(metrics: dict) -> str:
    corpus, machine, config = metrics["corpus"], metrics["machine"], metrics["config"]
    distill = config["distill"]
    lines = {
        "Training text": f"{corpus['train_files']} files, {corpus['train_bytes'] / 1e6:.1f} MB, "
        f"{corpus['train_tokens'] / 1e6:.2f} M tokens",
        "Held-out text": f"{corpus['heldout_files']} files, {corpus['heldout_bytes'] / 1e3:.0f} "
        f"kB, {corpus['heldout_tokens']:,} tokens",
        "Vocabulary": f"byte-level BPE, {corpus['vocab']:,} entries",
        "Student's loss": f"{distill['ce_weight']:g} cross-entropy + {distill['kl_weight']:g} "
        f"KL(teacher ‖ student), temperature {distill['temperature']:g}",
        "Control's loss": "cross-entropy; same initial weights, batches and steps as the student",
        "Batch": f"{config['rows']} x {config['length']} tokens",
        "Seed": f"{config['seed']} (one run; the interval is over files, not over seeds)",
        "Machine": f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}",
        "Software": f"xlstm_kernels {machine['xlstm_kernels']}, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['system']}",
        "Time": f"{seconds(metrics['wall_s'])} for this run",
    }
    return "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in lines.items())
