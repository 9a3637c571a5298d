"""The `eval` and `report` commands: models on text that none has seen, and the page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cli.flags import add_number, path, whole_numbers
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    _add_eval(commands)
    report = commands.add_parser(
        "report",
        help="write report.html and report.md of a run's folder anew",
        description=(
            "Writes RUN_DIR/report.html and RUN_DIR/report.md from its metrics.jsonl, scores.json, "
            "recipe.yaml and environment.json, and from the runs below RUN_DIR/controls."
        ),
        allow_abbrev=False,
    )
    report.add_argument("run_dir", type=path, metavar="RUN_DIR")
    report.set_defaults(command=run_report)


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="compare a student with its teacher and controls, and write the report",
        description=(
            "Scores models of transformers on the test files of a corpus: bits per byte, next "
            "tokens that are right, agreement with the teacher; each folder of the corpus is a "
            "task of the win-and-tie curve. Writes scores.json, report.html and report.md to OUT, "
            "which may be a run's folder: models, corpus and held-out files are then the run's."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=path, metavar="DIR", required=True, help="where scores and report go"
    )
    for flag, what in (
        ("--teacher", "what `save_pretrained` wrote, tokenizer too (default: the run's)"),
        ("--student", "the same of the student (default: the run's)"),
        ("--corpus", "score the files below DIR (default: the run's)"),
    ):
        parser.add_argument(flag, type=path, metavar="DIR", help=what)
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a model to show beside them, as 'hard labels=runs/ce/student'; may be repeated"
        " (those below OUT/controls are shown anyway)",
    )
    for flag, name, what in (
        ("--pattern", "GLOB", "which files (default: the run's, or *.txt)"),
        ("--text-key", "NAME", "of text in .jsonl and .parquet (default: the run's, or text)"),
    ):
        parser.add_argument(flag, metavar=name, help=what)
    parser.add_argument(
        "--all-files",
        action="store_true",
        help="all of the corpus, not the test files that training on it would hold out",
    )
    add_number(parser, "--length", "tokens that are read at once (default: the run's, or 512)")
    add_number(parser, "--rows", "how often at once", 8)
    add_number(
        parser, "--overlap", "of these tokens, how many the window before has too", 0, least=0
    )
    _add_more(parser)
    parser.set_defaults(command=run)


def _add_more(parser: argparse.ArgumentParser) -> None:
    """What is measured only where it is asked for."""
    parser.add_argument(
        "--harness",
        default="",
        metavar="TASK,TASK",
        help="score tasks of lm-eval-harness too, where lm_eval is installed",
    )
    parser.add_argument(
        "--harness-folder", type=path, metavar="DIR", help="of tasks of your own, as its YAML"
    )
    add_number(parser, "--harness-limit", "examples a task", most=1 << 30)
    for flag, what in (
        ("--needle", "look for a number in texts of so many tokens"),
        ("--contexts", "time teacher and student after prompts of so many tokens"),
    ):
        parser.add_argument(flag, type=whole_numbers, default=(), metavar="N,N", help=what)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from distill.data.corpus import Document, load_corpus, read_documents
    from distill.evaluation.assessment import Plan, assess
    from distill.evaluation.folders import Models
    from distill.progress import Reporter
    from distill.report.document import publish

    reporter = Reporter(Console(highlight=False))
    if args.harness:
        from distill.evaluation.harness import require_harness

        require_harness()
    heldout = _complete(args)
    models = Models(_folders(args))
    plan = Plan(args.length, args.rows, args.overlap, args.needle, args.contexts)
    models.require(plan)
    validation: Sequence[Document] = ()
    if args.all_files:
        documents = read_documents(args.corpus, args.pattern, args.text_key)
    else:
        given = {"text_key": args.text_key, **heldout}
        halves = load_corpus(args.corpus, args.pattern, **given).halves
        reporter.say(halves.describe())
        documents, validation = list(halves.test), halves.validation
    scores = assess(
        models, models.tokenizer, documents, plan, validation=validation, say=reporter.say
    )
    if args.harness:
        from distill.evaluation.harness import harness_tasks

        reporter.say(f"harness  {args.harness}")
        names, limit = args.harness.split(","), args.harness_limit
        scores["tasks"] += harness_tasks(
            models, models.tokenizer, names, folder=args.harness_folder, limit=limit
        )
    publish(args.out, scores, reporter.say)


def run_report(args: argparse.Namespace) -> None:
    from distill.report.document import HTML, write_report

    write_report(args.run_dir)
    print(f"report   {args.run_dir / HTML}")


def _complete(args: argparse.Namespace) -> dict[str, Any]:
    """Fill in what a run's recipe says; how the run holds files out of the corpus."""
    from distill.report.run_folder import RECIPE, control_students

    heldout = {}
    if (args.out / RECIPE).exists():
        from distill.training.recipe import Recipe

        recipe = Recipe.load(args.out / RECIPE)
        data = recipe.data
        heldout = {
            "heldout_fraction": data.heldout_fraction,
            "heldout_bytes": data.heldout_bytes,
        }
        args.teacher = args.teacher or (recipe.teacher.path and Path(recipe.teacher.path))
        args.student = args.student or args.out / "student"
        args.corpus = args.corpus or (data.corpus and Path(data.corpus))
        args.pattern = args.pattern or data.pattern
        args.text_key = args.text_key or data.text_key
        args.length = args.length or data.length
        given = {text.partition("=")[0] for text in args.control}
        there = control_students(args.out).items()
        args.control = [f"{n}={f}" for n, f in there if n not in given] + args.control
    args.pattern, args.length = args.pattern or "*.txt", args.length or 512
    args.text_key = args.text_key or "text"
    for name in ("teacher", "student", "corpus"):
        if getattr(args, name) is None:
            raise DistillError(f"--{name}: must be given, since {args.out} has no recipe with it")
    return heldout


def _folders(args: argparse.Namespace) -> dict[str, Path]:
    """Of the models by name, teacher first."""
    folders = {"teacher": args.teacher, "student": args.student}
    for text in args.control:
        name, _, folder = text.partition("=")
        if not name or not folder or name in folders:
            raise DistillError(f"--control: must be NAME=DIR, each name once, got {text!r}")
        folders[name] = Path(folder)
    return folders
