"""The `cache` command: a teacher's next words on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from distill.cli.flags import add_folders, add_heldout_fraction, add_number, add_pattern, path
from distill.errors import Interrupt

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    cache = commands.add_parser(
        "cache",
        help="keep a teacher's next words on disk, to distil without the teacher",
        description=(
            "Reads the training files of a corpus once with a causal language model of "
            "transformers and writes, for every token, the K likeliest next words, their "
            "log-probabilities and what is left for all others to OUT, as teacher.cache of a "
            "recipe takes it. With --samples it writes words drawn from the teacher's "
            "distribution instead: a few bytes, and a gradient that is the whole distribution's "
            "in the mean. Ctrl-C keeps what is done; the same command goes on. "
            "A cache of another teacher, corpus, length or kind of words is refused."
        ),
        allow_abbrev=False,
    )
    add_folders(
        cache,
        teacher="what `save_pretrained` wrote, tokenizer too",
        corpus="read the files below DIR",
        out="where the cache goes",
    )
    add_pattern(cache)
    _add_sizes(cache)
    cache.add_argument(
        "--boundaries",
        action="store_true",
        help="the teacher reads each document by itself, as data.boundaries of a recipe",
    )
    add_heldout_fraction(cache)
    cache.add_argument(
        "--tokens",
        type=path,
        metavar="DIR",
        help="where the tokens are kept, as data.tokens of a recipe (default: OUT/tokens)",
    )
    cache.add_argument("--dry-run", action="store_true", help="print sizes and write nothing")
    cache.set_defaults(command=run)


def _add_sizes(cache: argparse.ArgumentParser) -> None:
    add_number(
        cache,
        "--samples",
        "instead of the K likeliest words, N drawn for each token, as --seed has it",
        most=(1 << 16) - 1,
    )
    add_number(cache, "-k", "words of each token", 256, most=1 << 20)
    add_number(cache, "--seed", "of --samples", 0, least=0, most=1 << 32)
    add_number(cache, "--length", "tokens that the teacher reads at once", 512)
    add_number(cache, "--rows", "how often at once", 4, most=1 << 16)
    add_number(cache, "--max-tokens", "stop after N tokens", most=1 << 40)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from distill.data.capture import CaptureConfig, capture, load_teacher
    from distill.data.corpus import Source
    from distill.data.tokens import TOKENS, Plan, stored_text
    from distill.data.words import Drawn, Likeliest
    from distill.progress import Reporter

    kind = Likeliest(args.k) if args.samples is None else Drawn(args.samples, args.seed)
    config = CaptureConfig(kind, args.length, args.rows, args.max_tokens, args.boundaries)
    reporter = Reporter(Console(highlight=False))
    with Interrupt() as interrupt:
        model, tokenizer = load_teacher(args.teacher)
        plan = Plan(Source(args.corpus, args.pattern, args.text_key), args.heldout_fraction)
        with TemporaryDirectory() as scratch:
            folder = args.tokens or (Path(scratch) if args.dry_run else args.out / TOKENS)
            tokens = stored_text(plan, tokenizer, folder, reporter, interrupt).tokens
            capture(model, tokens, args.out, config, reporter, interrupt, args.dry_run)
