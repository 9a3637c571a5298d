"""What the flags of all commands are made of."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line and leaves the usage to --help.

    intermixed: whether words may stand between flags, as argparse itself does not have it.
    """

    intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # what is called calls this
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

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


def whole_numbers(text: str) -> tuple[int, ...]:
    """The type of a flag with several, rising, between commas."""
    return tuple(sorted({whole_number(1, 1 << 24)(part) for part in text.split(",")}))


def scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1000, got {text!r}")
    return value


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


def path(text: str) -> Path:
    """The type of a flag with a file or folder. Path("") would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def add_folders(parser: argparse.ArgumentParser, **what: str) -> None:
    """A flag that must be given for each name, and what the folder holds."""
    for name, text in what.items():
        parser.add_argument(f"--{name}", type=path, metavar="DIR", required=True, help=text)


def add_number(
    parser: argparse._ActionsContainer,
    flag: str,
    what: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = 1 << 24,
) -> None:
    """A flag for a whole number within two bounds."""
    shown = "" if default is None else " (default: %(default)s)"
    parser.add_argument(
        flag, type=whole_number(least, most), default=default, metavar="N", help=what + shown
    )


def add_recipe(parser: OneLineParser) -> None:
    """A recipe and changes to it, between any flags."""
    parser.intermixed = True
    parser.add_argument("recipe", metavar="RECIPE", help="name of a preset, or a file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the recipe")


def add_run_dir(parser: argparse._ActionsContainer, default: str, what: str) -> None:
    parser.add_argument(
        "--run-dir",
        type=path,
        default=Path(default),
        metavar="DIR",
        help=f"{what} (default: %(default)s)",
    )


def add_corpus(parser: argparse.ArgumentParser, what: str) -> None:
    """Text that a command can do without."""
    parser.add_argument("--corpus", type=path, metavar="DIR", help=what)
    add_pattern(parser)


def add_pattern(parser: argparse.ArgumentParser) -> None:
    """Which files of --corpus."""
    parser.add_argument(
        "--pattern",
        default="*.txt",
        metavar="GLOB",
        help="which files; those named .jsonl, .jsonl.gz and .parquet have a document a line or row"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="where these have it (default: %(default)s)",
    )


def add_heldout_fraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heldout-fraction",
        type=fraction,
        default=0.05,
        metavar="X",
        help="of the files, held out as data.heldout_fraction of a recipe (default: %(default)s)",
    )


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[OneLineParser]
