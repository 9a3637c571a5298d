"""The `bench` command: speed and memory of models by the length of what they have read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill.cli.flags import add_folders, add_number, path, whole_numbers
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a teacher and a student over context lengths",
        description=(
            "Times how fast two models of transformers read a prompt and write after it, and sizes "
            "what they remember, for each length of the prompt; prints from which length on the "
            "student writes faster. A teacher's cache is timed growing and of fixed size; the "
            "faster counts."
        ),
        allow_abbrev=False,
    )
    add_folders(
        parser, teacher="what `save_pretrained` wrote", student="what `save_pretrained` wrote"
    )
    parser.add_argument(
        "--contexts",
        type=whole_numbers,
        default=(256, 1024, 4096, 16384),
        metavar="N,N",
        help="lengths of the prompt (default: 256,1024,4096,16384)",
    )
    add_number(parser, "--steps", "tokens written after each", 16, most=1 << 16)
    add_number(parser, "--rows", "sequences at once", 1, most=1 << 16)
    add_number(parser, "--threads", "CPU threads (default: torch's choice)", most=1 << 16)
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the measurements there")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    import json

    import torch
    from rich.console import Console

    from distill.data.capture import load_model
    from distill.evaluation.bench import bench
    from distill.files import write_atomically
    from distill.progress import Reporter, table_of
    from distill.report.document import crossover_sentence, timing_table

    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    models = {role: load_model(getattr(args, role)) for role in ("teacher", "student")}
    try:
        for model in models.values():
            model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        why = str(error).splitlines()[0]
        raise DistillError(f"--device: cannot use {args.device!r}: {why}") from error
    with Reporter(console).meter("bench", len(args.contexts) * len(models)) as meter:
        timing = bench(
            models,
            args.contexts,
            steps=args.steps,
            rows=args.rows,
            after_case=lambda done, _: meter.update(done),
        )
    shown = timing_table(timing)
    console.print(table_of(shown.heads, shown.rows))
    console.print(crossover_sentence(timing), soft_wrap=True, markup=False)
    if args.json:
        write_atomically(args.json, json.dumps(timing, indent=1) + "\n")
