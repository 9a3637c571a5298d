"""Command line: python -m distill --help."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from distill.cli.flags import OneLineParser
from distill.errors import DistillError, Interrupted

EXAMPLES = """\
examples:
  python -m distill demo                            about five minutes on two cores
  python -m distill demo --resume                   continue after Ctrl-C
  python -m distill demo --quick --run-dir runs/q   the same path in seconds, to try an install
  python -m distill run linearize-paper teacher.path=models/llama data.corpus=~/notes --dry-run
  python -m distill cache --teacher models/llama --corpus ~/notes --pattern '*.md' --out notes
  python -m distill eval --teacher models/llama --student runs/run/student --out runs/run \
    --corpus ~/notes --pattern '*.md'
"""

LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}  # what they set

# Modules of distill.cli, in the order of --help.
COMMANDS = (
    *("demo", "run", "hybridize", "compress", "cache", "merge"),
    *("eval", "bench", "suggest", "tune"),
)


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
    for name in COMMANDS:
        import_module(f"distill.cli.{name}").add(commands)
    return parser


def resume_command(argv: list[str], launched: Sequence[str] = ()) -> str:
    """The command line that continues the one given by `argv`, or the one that launched it."""
    flags = argv if "--resume" in argv or argv[0] not in ("run", "demo") else [*argv, "--resume"]
    if not launched:
        return "python -m distill " + shlex.join(flags)
    before = list(launched[: -len(argv)] if list(launched[-len(argv) :]) == argv else launched)
    if len(before) > 1 and Path(before[1]).name in LAUNCHERS:
        before[:2] = [Path(before[1]).name]
    elif Path(before[0]).name.startswith("python"):
        before[0] = "python"
    return shlex.join([*before, *flags])


def launch_command() -> list[str]:
    """Of `accelerate launch` or torchrun, where they began this process."""
    if not LAUNCHED & os.environ.keys():
        return []
    try:
        whole = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        return [word.decode() for word in whole.split(b"\0")[:-1]]
    except OSError:  # no Linux
        return ["accelerate", "launch", "-m", "distill"]


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for an error, 2 for a bad flag, 128 + a signal."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        args.command(args)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            how = resume_command(argv, launch_command())
            print(f"stopped; continue with: {how}", file=sys.stderr)
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
