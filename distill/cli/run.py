"""The `run` command: a recipe, from its teacher to a student on disk."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill.cli.flags import add_recipe, add_run_dir
from distill.errors import Interrupt

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    run_ = commands.add_parser(
        "run",
        help="train a student by a recipe: a preset, or a YAML file",
        description=(
            "Trains a student stage after stage and leaves it in RUN_DIR/student, beside the "
            "resolved recipe, metrics.jsonl and checkpoints, and what it is worth on held-out "
            "files in scores.json, report.html and report.md. RECIPE is a preset (linearize-paper, "
            "compress-kd, distilbert, tinybert) or a YAML file; KEY=VALUE changes what is in it, "
            "as teacher.path=models/llama data.corpus=~/notes stages.1.lr=1e-5. Ctrl-C leaves a "
            "checkpoint; --resume goes on to the very same weights. On several GPUs: accelerate "
            "launch --config_file FILE -m distill run ..., with a file of distill/launch."
        ),
        allow_abbrev=False,
    )
    add_recipe(run_)
    add_run_dir(run_, "runs/run", "where everything goes")
    run_.add_argument("--resume", action="store_true", help="go on with what RUN_DIR holds")
    run_.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory and the teacher's loss; write nothing",
    )
    run_.add_argument(
        "--controls",
        metavar="NAME,NAME",
        help="train these too, by the same stages, and show them beside the student: hard-labels"
        " (the same student without its teacher's words) and teacher-trained-on",
    )
    run_.add_argument(
        "--no-report", action="store_true", help="leave scores and report to `distill eval`"
    )
    run_.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from distill.progress import Reporter
    from distill.training import parallel
    from distill.training.recipe import Recipe
    from distill.training.runs import describe
    from distill.training.runs import run as run_recipe

    changes = ["evaluation.report=false"] if args.no_report else []
    changes += [f"controls=[{args.controls}]"] if args.controls is not None else []
    recipe = Recipe.load(args.recipe, args.overrides + changes)
    reporter = Reporter(Console(highlight=False))
    if args.dry_run:
        describe(recipe, args.run_dir, reporter)
        return
    with Interrupt() as interrupt:
        run_recipe(recipe, args.run_dir, reporter, interrupt, resume=args.resume)
    parallel.leave()
