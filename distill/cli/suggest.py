"""The `suggest` command: pairs of teachers and students, and shapes of students."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill.cli.flags import add_number, path
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "suggest",
        help="rank teachers and students among local models",
        description=(
            "Ranks pairs of models below DIR, or in a YAML list of folders, as teacher and "
            "student, with the students that `hybridize` and `compress` would make of each: "
            "pairs of one tokenizer first, then by what training costs. Reads configurations and "
            "tokenizers, no weights. How good a student becomes only `run` and `eval` tell."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("models", type=path, metavar="DIR|LIST.yaml")
    for flag, default, what in (
        ("--tokens", 10**9, "to train on"),
        ("--context", 4096, "tokens at which states are sized"),
        ("--max-parameters", None, "of students"),
        ("--max-state-bytes", None, "of students"),
    ):
        add_number(parser, flag, what, default, most=10**18)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from distill.models.suggestion import folders_of, suggest, table
    from distill.progress import table_of

    folders = folders_of(args.models)
    if not folders:
        raise DistillError(f"suggest: {args.models} must hold models, got none")
    pairs = suggest(
        folders,
        tokens=args.tokens,
        context=args.context,
        max_parameters=args.max_parameters,
        max_state_bytes=args.max_state_bytes,
        # Of a list each was asked for; below a folder lies what there is.
        on_unknown=_say_skipped if args.models.is_dir() else None,
    )
    if not pairs:
        raise DistillError("suggest: no student is smaller than its teacher and within the limits")
    Console(highlight=False).print(table_of(*table(pairs)))


def _say_skipped(error: DistillError) -> None:
    print(f"skipped  {' '.join(str(error).split())}")
