"""The `hybridize` command: a transformer with mixers of mLSTM and a window for attention."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from distill.cli.flags import add_corpus, add_folders, add_number
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.cli.flags import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "hybridize",
        help="a transformer with mixers of mLSTM and a window for attention",
        description=(
            "Writes the teacher with hybrid mixers in place of attention to OUT, all other weights "
            "being its own. It is to be trained, as by `run`, which can also make it. With "
            "--corpus its gates begin from where the teacher looks."
        ),
        allow_abbrev=False,
    )
    add_folders(
        parser,
        teacher="what `save_pretrained` wrote, tokenizer too",
        out="where the student goes",
    )
    add_number(parser, "--window", "tokens that attention still sees", 512)
    add_number(parser, "--sinks", "first tokens that it sees too", 4, least=0)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any of HybridOptions, as layers=[0,2] or feature_map=elu; may be repeated",
    )
    add_corpus(parser, "text below DIR for the gates")
    add_number(
        parser, "--length", "tokens of the text that are looked at", 2048, least=2, most=1 << 20
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    import yaml

    from distill.data.capture import first_tokens, load_teacher, require_finite, save_model
    from distill.data.corpus import load_corpus
    from distill.files import require_place
    from distill.hybrid.convert import hybridize, new_parameters
    from distill.hybrid.stages import calibrate_gates

    require_place(args.out, args.teacher)
    options = {}
    for text in args.option:
        name, _, value = text.partition("=")
        if not name or not value or name in ("window", "sinks"):
            raise DistillError(f"--option: must be as layers=[0,2], got {text!r}")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DistillError(f"--option: cannot read {text!r}: {error}") from error
    teacher, tokenizer = load_teacher(args.teacher)
    student = hybridize(teacher, window=args.window, sinks=args.sinks, **options)
    if args.corpus is not None:
        corpus = load_corpus(args.corpus, args.pattern, text_key=args.text_key)
        tokens_1T = first_tokens(corpus, tokenizer, args.length)[None]
        require_finite(teacher, [tokens_1T])
        calibrate_gates(student, tokens_1T)
    save_model(args.out, student, tokenizer)
    added = sum(parameter.numel() for parameter in new_parameters(student).values())
    print(
        f"student  {args.out}: {added:,} new parameters beside the teacher's"
        f" {teacher.num_parameters():,}"
    )
