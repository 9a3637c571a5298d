"""The `tune` command: which choices of a recipe end best, within a budget of tokens."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill.cli.flags import add_number, add_recipe, add_run_dir, whole_number
from distill.errors import DistillError, Interrupt

if TYPE_CHECKING:
    from distill.cli.flags import Commands
    from distill.training.tuning import Trial


def add(commands: Commands) -> None:
    tune = commands.add_parser(
        "tune",
        help="compare learning rates, temperatures, weights or layer maps in a token budget",
        description=(
            "Trains RECIPE with each combination of the values that --over names, for a little; "
            "then the best of them anew for longer, and so on (successive halving). Prints every "
            "trial's bits per byte of validation files, writes the best recipe to "
            "RUN_DIR/best.yaml and scores its student on the test files. The same command goes on "
            "after Ctrl-C."
        ),
        allow_abbrev=False,
    )
    add_recipe(tune)
    tune.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=V1,V2,...",
        help="values to try, as stages.1.lr=1e-5,3e-5 or stages.1.losses.1.args.temperature=1,2;"
        " once for each key",
    )
    tune.add_argument(
        "--tokens",
        type=whole_number(1, 1 << 50),
        required=True,
        metavar="N",
        help="that all trials train on together",
    )
    add_number(
        tune, "--most", "try N combinations, drawn by --seed (default: all)", least=2, most=10_000
    )
    add_number(tune, "--keep", "one trial in N goes on to the next round", 3, least=2, most=100)
    add_number(tune, "--seed", "of --most", 1, least=0, most=2**32 - 1)
    add_run_dir(tune, "runs/tune", "where the runs go")
    tune.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from distill.progress import Reporter
    from distill.training import parallel
    from distill.training.tuning import BEST, tune

    console = Console(highlight=False)
    over = dict(_values(text) for text in args.over)

    def show(trial: Trial) -> None:
        shown = " ".join(f"{key}={value}" for key, value in trial.choices.items())
        print(f"round {len(trial.scores)}  {trial.scores[-1]:.4f} bits per byte  {shown}")

    with Interrupt() as interrupt:
        trials = tune(
            args.recipe,
            over,
            args.run_dir,
            Reporter(console),
            interrupt,
            tokens=args.tokens,
            overrides=args.overrides,
            most=args.most,
            keep=args.keep,
            seed=args.seed,
            after_trial=show,
        )
    parallel.leave()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2))
    for key in over:
        table.add_column(key)
    rounds = len(trials[0].scores)
    for number in range(rounds):
        table.add_column(f"round {number + 1}", justify="right")
    for trial in trials:
        scores = [f"{score:.4f}" for score in trial.scores] + [""] * (rounds - len(trial.scores))
        table.add_row(*trial.choices.values(), *scores)
    console.print(table)
    console.print(f"test     {trials[0].test:.4f} bits per byte, of files that chose nothing")
    console.print(f"best     {args.run_dir / BEST}", soft_wrap=True, markup=False)


def _values(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    if not key or not values:
        raise DistillError(f"--over: must be as KEY=V1,V2, got {text!r}")
    return key, values.split(",")
