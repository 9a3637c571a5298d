"""A run's report: one page that needs nothing but itself, and the same tables as Markdown."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distill.evaluation.assessment import GENERATION
from distill.evaluation.recovery import WinAndTie, win_and_tie
from distill.files import write_atomically
from distill.report import figures, page
from distill.report.plots import svg
from distill.report.run_folder import SCORES, RunFolder

HTML, MARKDOWN = "report.html", "report.md"
WORST = 5

# title, what a model must have for it, cell(model, teacher) -> text
ROWS: tuple[tuple[str, str, Callable[[dict, dict], str]], ...] = (
    ("bits per byte", "bits_per_byte", lambda m, t: f"{m['bits_per_byte']:.3f}"),
    ("next token right", "accuracy", lambda m, t: f"{m['accuracy']:.1%}"),
    ("agrees with teacher", "agreement", lambda m, t: f"{m['agreement']:.1%}"),
    (
        "of teacher's accuracy",
        "accuracy",
        lambda m, t: f"{m['accuracy'] / t['accuracy']:.1%}" if t["accuracy"] else "-",
    ),
    ("parameters", "parameters", lambda m, t: f"{m['parameters']:,}"),
    ("share of parameters", "parameters", lambda m, t: f"{m['parameters'] / t['parameters']:.0%}"),
    ("megabytes", "bytes", lambda m, t: f"{m['bytes'] / 1e6:.2f}"),
)


class Table(NamedTuple):
    """A part of the report that is a table in both forms."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    lead: bool = False  # whether the first row is what counts most


def publish(path: Path, scores: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write scores.json and the report into a run's folder, and say what came of it."""
    recovery = {
        name: {
            "alpha_star": found.alpha_star,
            "share_at_0": found.share(0),
            "tasks": found.recovery,
        }
        for name, found in comparisons(scores).items()
    }
    write_atomically(path / SCORES, json.dumps(scores | {"recovery": recovery}, indent=1) + "\n")
    write_report(path)
    for sentence in sentences(scores):
        say(sentence)
    say(f"report   {path / HTML}")


def write_report(path: Path) -> None:
    """Write report.html and report.md into a run's folder, from what is in it.

    Raises:
        DistillError: there is nothing to report on, a file is damaged, or one cannot be written.
    """
    run = RunFolder.read(path)
    write_atomically(path / HTML, render_html(run))
    write_atomically(path / MARKDOWN, render_markdown(run))


def render_html(run: RunFolder) -> str:
    """The page."""
    parts = [f"<p>{html.escape(sentence)}</p>" for sentence in sentences(run.scores)]
    if run.scores.get("models"):
        parts.append(page.tiles(tiles(run.scores)))
    colors = figures.colors_of(list(run.scores.get("models", {})))
    for each in tables(run.scores):
        parts.append(f"<h2>{html.escape(each.title)}</h2>")
        parts.append(page.table(each.heads, each.rows, colors, lead=each.lead))
        if each.note:
            parts.append(f'<p class="soft">{html.escape(each.note)}</p>')
    for title, plots in drawings(run):
        parts.append(f'<h2>{title}</h2><div class="plots">{"".join(plots)}</div>')
    parts.append("<h2>How this was made</h2>")
    parts.append(page.definitions(environment(run)))
    if run.recipe:
        recipe = html.escape(run.recipe)
        parts.append(f"<details><summary>recipe.yaml</summary><pre>{recipe}</pre></details>")
    return page.PAGE.substitute(title=html.escape(title_of(run)), body="\n".join(parts))


def render_markdown(run: RunFolder) -> str:
    """The same numbers for a terminal, a commit or a comment."""
    lines = [f"# {title_of(run)}", "", *(f"{s}\n" for s in sentences(run.scores))]
    for each in tables(run.scores):
        lines += [f"## {each.title}", ""]
        lines.append("| " + " | ".join(each.heads) + " |")
        lines.append("|---" + "|---:" * (len(each.heads) - 1) + "|")
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in each.rows]
        lines += ["", *([each.note, ""] if each.note else [])]
    lines += ["## How this was made", ""]
    lines += [f"- {name}: {value}" for name, value in environment(run).items()]
    if run.recipe:
        lines += ["", "```yaml", run.recipe.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def title_of(run: RunFolder) -> str:
    return f"Distillation report: {run.path.resolve().name}"


def comparisons(scores: Mapping[str, Any]) -> dict[str, WinAndTie]:
    """Student against teacher on all tasks, and on those alone in which it has to write.

    Tasks at which the teacher fails altogether say nothing of the student, and are left out.
    """
    found = {}
    tasks = [task for task in scores.get("tasks") or [] if task["scores"][scores["teacher"]] > 0]
    for name, chosen in (
        ("all tasks", tasks),
        ("generation alone", [task for task in tasks if task["kind"] == GENERATION]),
    ):
        if chosen and (name == "all tasks" or len(chosen) < len(tasks)):
            student, teacher = (
                {task["name"]: task["scores"][scores[role]] for task in chosen}
                for role in ("student", "teacher")
            )
            found[name] = win_and_tie(student, teacher)
    return found


def sentences(scores: Mapping[str, Any]) -> Iterator[str]:
    """What came of it, whichever way it went."""
    models = scores.get("models")
    if not models:
        return
    names = list(models)
    teacher, student = models[scores["teacher"]], models[scores["student"]]
    change = student["bits_per_byte"] / teacher["bits_per_byte"] - 1
    yield (
        f"The student takes {student['bits_per_byte']:.3f} bits per byte of held-out text, the"
        f" teacher {teacher['bits_per_byte']:.3f}: {abs(change):.1%}"
        f" {'more' if change > 0 else 'less'}. Its first choice of the next token is the teacher's"
        f" {student['agreement']:.1%} of the time."
    )
    for name in names[2:]:
        gain = models[name]["bits_per_byte"] - student["bits_per_byte"]
        yield (
            f"Control {name!r} takes {models[name]['bits_per_byte']:.3f}: the student is"
            f" {abs(gain):.3f} bits per byte {'better' if gain > 0 else 'worse'} than it."
        )
    yield from _over_seeds(scores)
    for name, found in comparisons(scores).items():
        worst = found.worst(1)[0]
        yield (
            f"Over {len(found.recovery)} tasks ({name}) it equals or beats the teacher on"
            f" {found.share(0):.0%}; alpha* is {found.alpha_star:.3f}; the worst is {worst} with"
            f" {found.recovery[worst]:.0%} of the teacher's score."
        )
    if timing := scores.get("bench"):
        yield crossover_sentence(timing)


def _over_seeds(scores: Mapping[str, Any]) -> Iterator[str]:
    """`seeds` of the scores: a dict for each seed, bits per byte by model."""
    seeds: list[dict[str, float]] = scores.get("seeds") or []
    student = str(scores.get("student"))
    for name in seeds[0] if seeds else ():
        if name != student:
            better = sum(each[student] < each[name] for each in seeds)
            yield f"The student is better than {name!r} in {better} of {len(seeds)} seeds."


def crossover_sentence(timing: Mapping[str, Any]) -> str:
    """From where on the student writes faster."""
    teacher, student = list(timing["models"].values())[:2]
    contexts = [row["context"] for row in teacher]
    at = timing["crossover"]
    if at is None:
        return (
            f"The student writes no faster than the teacher at any of the contexts measured, up to"
            f" {contexts[-1]:,} tokens."
        )
    ratio = teacher[-1]["decode_ms"] / student[-1]["decode_ms"]
    slower = [context for context in contexts if context < at]
    text = f"The student writes faster than the teacher from {at:,} tokens of context on"
    if slower:
        text += f" (and slower, or no faster, at {slower[-1]:,} and below)"
    return f"{text}; {ratio:.1f} times as fast at {contexts[-1]:,}."


def tiles(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    teacher, student = (scores["models"][scores[role]] for role in ("teacher", "student"))
    yield f"{student['bits_per_byte']:.3f}", "bits per byte, student"
    yield f"{teacher['bits_per_byte']:.3f}", "bits per byte, teacher"
    yield f"{student['agreement']:.1%}", "agreement with the teacher"
    yield f"{student['parameters'] / teacher['parameters']:.0%}", "of the teacher's parameters"
    for name, found in comparisons(scores).items():
        yield f"{found.alpha_star:.3f}", f"alpha*, {name}"
    if timing := scores.get("bench"):
        at = timing["crossover"]
        yield (f"{at:,}" if at is not None else "none"), "tokens from which it writes faster"


def tables(scores: Mapping[str, Any]) -> Iterator[Table]:
    """All that there is of the scores."""
    models = scores.get("models")
    if not models:
        return
    teacher = models[scores["teacher"]]
    yield Table(
        "Results on held-out text",
        ["", *models],
        [
            [title, *(cell(m, teacher) if m.get(key) is not None else "-" for m in models.values())]
            for title, key, cell in ROWS
        ],
        "Bits per byte: the code length of the text under the model over its size; lower is better."
        " What a student gains on its teacher may be further training: a control that trained the"
        " teacher on for the same budget tells.",
        lead=True,
    )
    if len(models) > 2:
        yield _controls(models, scores["student"])
    if seeds := scores.get("seeds"):
        yield Table(
            "Bits per byte over seeds",
            ["", *seeds[0]],
            [
                [f"{at}.", *(f"{value:.3f}" for value in each.values())]
                for at, each in enumerate(seeds, 1)
            ],
        )
    for name, found in comparisons(scores).items():
        yield _worst(scores, name, found)
    if needles := scores.get("needle"):
        yield Table(
            "A number found in a long text",
            ["tokens", *needles],
            [
                [f"{int(n):,}", *(f"{shares[n]:.0%}" for shares in needles.values())]
                for n in next(iter(needles.values()))
            ],
        )
    if timing := scores.get("bench"):
        yield timing_table(timing)


def _controls(models: Mapping[str, Any], student: str) -> Table:
    """All models after teacher and student, against the latter."""
    own = models[student]["bits_per_byte"]
    bits = {name: models[name]["bits_per_byte"] for name in list(models)[2:]}
    return Table(
        "The student against its controls",
        ["control", "bits per byte", "student", "difference", "student is better"],
        [
            [name, f"{each:.3f}", f"{own:.3f}", f"{own - each:+.4f}", "yes" if own < each else "no"]
            for name, each in bits.items()
        ],
        "A difference below zero is what the student saves.",
    )


def _worst(scores: Mapping[str, Any], name: str, found: WinAndTie) -> Table:
    by_name = {task["name"]: task["scores"] for task in scores["tasks"]}
    roles = [scores["teacher"], scores["student"]]
    return Table(
        f"Where the student recovers least, {name}",
        ["task", *roles, "recovered"],
        [
            [task, *(f"{by_name[task][role]:.3f}" for role in roles), f"{found.recovery[task]:.1%}"]
            for task in found.worst(WORST)
        ],
        f"{_failed(scores)}The worst {min(WORST, len(found.recovery))} of {len(found.recovery)}."
        f" C_0 = {found.share(0):.2f}, alpha* = {found.alpha_star:.3f}: with that much allowed for,"
        " half of the tasks are won or tied; the others may be far off.",
    )


def _failed(scores: Mapping[str, Any]) -> str:
    names = [t["name"] for t in scores["tasks"] if t["scores"][scores["teacher"]] <= 0]
    if not names:
        return ""
    return f"Left out, since the teacher scores 0 there: {', '.join(names)}. "


def timing_table(timing: Mapping[str, Any]) -> Table:
    """What `bench` measured."""
    models = timing["models"]
    heads = ["context"]
    for unit in ("ms a token", "read, tokens/s", "cache, kB"):
        heads += [f"{name}: {unit}" for name in models]
    rows = []
    for at, context in enumerate(row["context"] for row in next(iter(models.values()))):
        measured = [each[at] for each in models.values()]
        cells = [f"{row['decode_ms']:.2f}" for row in measured]
        cells += [f"{row['prefill_tokens_per_s']:,.0f}" for row in measured]
        cells += [f"{row['cache_bytes'] / 1e3:,.1f}" for row in measured]
        rows.append([f"{context:,}", *cells])
    return Table(
        "Speed and memory over context",
        heads,
        rows,
        f"{crossover_sentence(timing)} Batch {timing['rows']}, {timing['dtype']}, on"
        f" {timing['device']}; writing: the median of {timing['steps']} tokens.",
    )


def drawings(run: RunFolder) -> Iterator[tuple[str, list[str]]]:
    """Groups of figures, those that there is something to draw of."""
    scores, found = run.scores, comparisons(run.scores)
    training = [
        _draw(f"Loss by component, {stage}", partial(figures.losses, run=run, stage=stage))
        for stage in run.stages
        if run.curve("loss", stage=stage).values or run.names("losses", stage)
    ]
    runs = {"student": run, **run.controls}
    teacher = scores.get("models", {}).get(scores.get("teacher"), {})
    aside = scores.get("validation", {}).get(scores.get("teacher"))
    for name, label, caption in (
        ("bits_per_byte", "bits per byte", "Validation text while learning"),
        ("agreement", "agreement with the teacher", "Agreement while learning"),
    ):
        if run.curve("heldout", name).values:
            level = (aside or teacher.get(name)) if name == "bits_per_byte" else None
            draw = partial(figures.heldout, runs=runs, name=name, label=label, teacher=level)
            training.append(_draw(caption, draw))
    if training:
        yield "Training", training
    quality = []
    if found:
        draw_recovery = partial(figures.recovery, found=found["all tasks"])
        quality.append(_draw("What is recovered, task by task", draw_recovery))
        quality.append(_draw("Win and tie", partial(figures.win_and_tie, found=found)))
    if scores.get("gates"):
        caption = "Mean output gate of each head"
        quality.append(_draw(caption, partial(figures.gates, by_layer=scores["gates"])))
    if quality:
        yield "Quality", quality
    if timing := scores.get("bench"):
        colors = figures.colors_of(list(scores["models"]))
        yield (
            "Over context",
            [
                _draw(
                    caption,
                    partial(figures.over_context, bench=timing, colors=colors, key=key, **how),
                )
                for caption, key, how in (
                    ("Writing", "decode_ms", {"label": "ms a token"}),
                    ("Reading", "prefill_tokens_per_s", {"label": "tokens a second"}),
                    ("What is remembered", "cache_bytes", {"label": "kB", "scale": 1e-3}),
                )
            ],
        )


def _draw(caption: str, draw: Callable[..., None]) -> str:
    return page.figure(caption, svg(caption, draw))


def environment(run: RunFolder) -> dict[str, str]:
    """Of environment.json, and of the machine that timed the models."""
    found = dict(run.environment)
    if not found and (timing := run.scores.get("bench")):
        found = timing["machine"]
    values = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in found.items()
    }
    return {"folder": str(run.path), **values}
