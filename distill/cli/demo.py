"""The `demo` command: a teacher, a student and a control on the standard library, and a report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill.cli.flags import add_number, add_run_dir, path, scale
from distill.errors import Interrupt

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="a transformer becomes a hybrid and a smaller model, with controls and a report",
        description=(
            "Trains a transformer over bytes (the teacher) on the source of Python's standard "
            "library, turns its attention into mLSTMs and short windows and distils that hybrid, "
            "and distils a small student with half of its layers; each for three seeds. Controls: "
            "the teacher, trained on for as long, and the small student without a teacher. Scores "
            "all on files that none has seen, times decoding and training, prints a table and "
            "writes RUN_DIR/report.html and RUN_DIR/metrics.json. Ctrl-C leaves a checkpoint; "
            "--resume continues to the very same weights. A finished teacher is kept in RUN_DIR "
            "and used again."
        ),
        allow_abbrev=False,
    )
    text = demo.add_argument_group("text")
    text.add_argument(
        "--corpus",
        type=path,
        metavar="DIR",
        help="train on the files below DIR (default: Python's standard library)",
    )
    text.add_argument(
        "--pattern",
        default="*.py",
        metavar="GLOB",
        help="which files of the corpus to read (default: %(default)s)",
    )
    budget = demo.add_argument_group("run")
    add_run_dir(budget, "runs/demo", "where checkpoints, metrics and the report go")
    budget.add_argument(
        "--resume",
        action="store_true",
        help="continue what RUN_DIR holds; to the same bits with the same number of threads",
    )
    budget.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and budgets: seconds instead of minutes",
    )
    budget.add_argument(
        "--steps-scale",
        type=scale,
        default=1.0,
        metavar="X",
        help="multiply every step budget by X (default: 1)",
    )
    add_number(
        budget,
        "--seed",
        "the first of three, which decide the order of the text",
        1,
        least=0,
        most=2**32 - 3,
    )
    add_number(budget, "--threads", "CPU threads (default: torch's choice)", most=4096)
    budget.add_argument(
        "--backend",
        choices=("auto", "cpu", "reference"),
        default="auto",
        help="which implementation of the kernels to run on (default: %(default)s)",
    )
    demo.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    # Imported here so that --help and a mistyped flag do not wait for torch.
    import torch
    from rich.console import Console

    from distill.data.corpus import load_corpus, standard_library
    from distill.demo.config import demo_config
    from distill.demo.report import publish
    from distill.demo.results import measure
    from distill.demo.run import Demo
    from distill.machine import resolve_backend
    from distill.progress import Reporter

    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    reporter = Reporter(console)
    backend = resolve_backend(args.backend)
    root = args.corpus or standard_library()
    config = demo_config(root, args.pattern, args.quick, args.steps_scale, args.seed, backend)
    with Interrupt() as interrupt:
        corpus = load_corpus(root, args.pattern, heldout_bytes=config.heldout_bytes)
        slow = ", plain eager torch: many times slower" if backend == "reference" else ""
        reporter.say(f"kernels  backend {backend!r}, {torch.get_num_threads()} threads{slow}")
        demo = Demo(config, corpus, args.run_dir, args.resume, reporter, interrupt)
        publish(measure(demo), args.run_dir, console)
