"""Command line: python -m distill --help."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from distill.errors import DistillError, Interrupt, Interrupted

EXAMPLES = """\
examples:
  python -m distill demo                            about three minutes on two cores
  python -m distill demo --resume                   continue after Ctrl-C
  python -m distill demo --corpus ~/src/project     your own Python files
  python -m distill demo --corpus ~/notes --pattern '*.md'
  python -m distill demo --quick --run-dir runs/q  the same path in seconds, to try an install
  python -m distill cache --teacher models/llama --corpus ~/notes --pattern '*.md' --out notes
"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line and leaves the usage to --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of a flag whose value lies within two bounds."""

    def parse(text: str) -> int:
        # Longer numbers than a bound are out of it, and int() refuses very long ones.
        fits = text.isdecimal() and len(text) <= len(str(most))
        if not fits or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least} and at most {most}, got {text!r}"
            )
        return int(text)

    return parse


def scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1000, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each command sets `command` to the function that runs it."""
    parser = OneLineParser(
        prog="python -m distill",
        description="Distil language models into smaller recurrent ones on xlstm_kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_cache(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train a teacher, distil a student, compare it with a control, write a report",
        description=(
            "Trains a language model (the teacher) on the source of Python's standard library, "
            "distils it into a student with at most 40 % of its parameters, and trains a control: "
            "the same student, from the same weights, on the same batches, without the teacher. "
            "Scores all three on files that none has seen, times the kernels against plain eager "
            "torch, prints a table and writes RUN_DIR/report.html and RUN_DIR/metrics.json. Ctrl-C "
            "leaves a checkpoint; --resume continues to the very same weights. A finished teacher "
            "is kept in RUN_DIR and used again."
        ),
        allow_abbrev=False,
    )
    text = demo.add_argument_group("text")
    text.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="train on the files below DIR (default: Python's standard library)",
    )
    text.add_argument(
        "--pattern",
        default="*.py",
        metavar="GLOB",
        help="which files of the corpus to read (default: %(default)s)",
    )
    run = demo.add_argument_group("run")
    run.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where checkpoints, metrics and the report go (default: %(default)s)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue what RUN_DIR holds; to the same bits with the same number of threads",
    )
    run.add_argument(
        "--quick",
        action="store_true",
        help="tiny models and budgets: seconds instead of minutes",
    )
    run.add_argument(
        "--steps-scale",
        type=scale,
        default=1.0,
        metavar="X",
        help="multiply every step budget by X (default: 1)",
    )
    run.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=1,
        metavar="N",
        help="decides weights, batches and samples (default: %(default)s)",
    )
    run.add_argument(
        "--threads",
        type=whole_number(1, 4096),
        metavar="N",
        help="CPU threads (default: torch's choice)",
    )
    run.add_argument(
        "--backend",
        choices=("auto", "cpu", "reference"),
        default="auto",
        help="which implementation of the kernels to run on (default: %(default)s)",
    )
    demo.set_defaults(command=run_demo)


def _add_cache(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    cache = commands.add_parser(
        "cache",
        help="keep a teacher's likeliest next words on disk, to distil without the teacher",
        description=(
            "Reads the files of a corpus once with a causal language model of transformers and "
            "writes, for every token, the K likeliest next words, their log-probabilities and what "
            "is left for all others to OUT. Ctrl-C keeps what is done; the same command goes on. "
            "A cache of another teacher, corpus, length or K is refused."
        ),
        allow_abbrev=False,
    )
    for flag, what in (
        ("--teacher", "what `save_pretrained` wrote, tokenizer too"),
        ("--corpus", "read the files below DIR"),
        ("--out", "where the cache goes"),
    ):
        cache.add_argument(flag, type=Path, metavar="DIR", required=True, help=what)
    cache.add_argument(
        "--pattern", default="*.txt", metavar="GLOB", help="which files (default: %(default)s)"
    )
    for flag, most, default, what in (
        ("-k", 1 << 20, 256, "words of each token"),
        ("--length", 1 << 24, 512, "tokens that the teacher reads at once"),
        ("--rows", 1 << 16, 4, "how often at once"),
    ):
        cache.add_argument(
            flag,
            type=whole_number(1, most),
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    cache.add_argument(
        "--max-tokens", type=whole_number(1, 1 << 40), metavar="N", help="stop after N tokens"
    )
    cache.add_argument("--dry-run", action="store_true", help="print sizes and write nothing")
    cache.set_defaults(command=run_cache)


def run_cache(args: argparse.Namespace) -> None:
    """The `cache` command."""
    from rich.console import Console

    from distill.capture import CaptureConfig, capture, corpus_tokens, load_teacher
    from distill.progress import Reporter

    config = CaptureConfig(args.k, args.length, args.rows, args.max_tokens)
    reporter = Reporter(Console(highlight=False))
    with Interrupt() as interrupt:
        model, tokenizer = load_teacher(args.teacher)
        tokens_N = corpus_tokens(args.corpus, args.pattern, tokenizer)
        capture(model, tokens_N, args.out, config, reporter, interrupt, args.dry_run)


def run_demo(args: argparse.Namespace) -> None:
    """The `demo` command."""
    # Imported here so that --help and a mistyped flag do not wait for torch.
    import torch
    from rich.console import Console

    from distill.corpus import load_corpus, standard_library
    from distill.demo.config import demo_config
    from distill.demo.report import publish
    from distill.demo.run import Demo
    from distill.machine import resolve_backend
    from distill.progress import Reporter

    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    reporter = Reporter(console)
    backend = resolve_backend(args.backend)
    config = demo_config(args.quick, args.steps_scale, args.seed, backend)
    with Interrupt() as interrupt:
        corpus = load_corpus(
            args.corpus or standard_library(), args.pattern, heldout_bytes=config.heldout_bytes
        )
        slow = ", plain eager torch: many times slower" if backend == "reference" else ""
        reporter.say(f"kernels  backend {backend!r}, {torch.get_num_threads()} threads{slow}")
        demo = Demo(config, corpus, args.run_dir, args.resume, reporter, interrupt)
        publish(demo.run(), args.run_dir, console)


def resume_command(argv: list[str]) -> str:
    """The command line that continues the one given by `argv`."""
    flags = argv if "--resume" in argv or argv[0] != "demo" else [*argv, "--resume"]
    return "python -m distill " + shlex.join(flags)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for an error, 2 for a bad flag, 128 + a signal."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        args.command(args)
    except Interrupted as stop:
        print(f"stopped; continue with: {resume_command(argv)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DistillError as error:
        print(f"distill: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"distill: {error}; install with: pip install '.[distill]'", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
