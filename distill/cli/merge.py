"""The `merge` command: trained students of one architecture as one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli.flags import add_corpus, add_heldout_fraction, path, whole_number
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge trained models of one architecture into one, by weighted mean",
        description=(
            "Writes the mean of models to OUT, a tensor at a time: each weighs the same, or what "
            "--weights says, or what scores best on text among all multiples of 1 / N (--sweep N); "
            "files of --corpus that training holds out choose, others of them score what is chosen."
        ),
        allow_abbrev=False,
    )
    merge.add_argument(
        "experts", nargs="+", metavar="NAME=DIR", help="what `save_pretrained` wrote"
    )
    merge.add_argument("--out", type=path, metavar="DIR", required=True, help="the merged model")
    how = merge.add_mutually_exclusive_group()
    how.add_argument("--weights", metavar="NAME=X,...", help="of each, summing to 1")
    how.add_argument(
        "--sweep", type=whole_number(1, 100), metavar="N", help="try all multiples of 1 / N"
    )
    add_corpus(merge, "text that --sweep scores on")
    add_heldout_fraction(merge)
    merge.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from distill.models.merging import merge

    experts = {name: Path(folder) for name, folder in map(_pair, args.experts)}
    if len(experts) != len(args.experts):
        raise DistillError("merge: each expert must have a name of its own")
    weights: dict[str, float] | str = "uniform"
    if args.weights is not None:
        weights = {}
        for name, number in map(_pair, args.weights.split(",")):
            try:
                weights[name] = float(number)
            except ValueError as error:
                raise DistillError(f"--weights: must be numbers, got {number!r}") from error
    if args.sweep is None:
        print(f"merged   {merge(experts, weights, out=args.out)}")
    else:
        _sweep(args, experts)


def _sweep(args: argparse.Namespace, experts: dict[str, Path]) -> None:
    """Merge with the weights that take the fewest bits per byte of validation text."""
    from distill.data.capture import load_model, load_tokenizer
    from distill.data.corpus import load_corpus
    from distill.evaluation.scores import evaluate
    from distill.files import require_place
    from distill.models.merging import Trial, merge, sweep

    if args.corpus is None:
        raise DistillError("--sweep: --corpus must be given, the text to score on")
    require_place(args.out, *experts.values())
    given = {"heldout_fraction": args.heldout_fraction, "text_key": args.text_key}
    halves = load_corpus(args.corpus, args.pattern, **given).halves
    documents = halves.require_validation("--sweep")
    print(halves.describe())
    tokenizer = load_tokenizer(next(iter(experts.values())))

    def show(trial: Trial, done: int, total: int) -> None:
        shown = ",".join(f"{name}={weight:g}" for name, weight in trial.weights.items())
        print(f"trial    {done}/{total}  {trial.score:.4f} bits per byte  {shown}")

    found = sweep(
        experts,
        lambda model: evaluate(model, tokenizer, documents).bits_per_byte,
        steps=args.sweep,
        after_trial=show,
    )
    merged = merge(experts, found[0].weights, out=args.out)
    test = evaluate(load_model(merged), tokenizer, halves.test).bits_per_byte
    print(f"test     {test:.4f} bits per byte")
    print(f"merged   {merged}")


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise DistillError(f"merge: must be as NAME=VALUE, got {text!r}")
    return name, value
