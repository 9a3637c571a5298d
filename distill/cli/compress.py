"""The `compress` command: a smaller model of a teacher's own family, from its weights."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from distill.cli.flags import add_corpus, add_folders, add_number
from distill.errors import DistillError

if TYPE_CHECKING:
    from distill.cli.flags import Commands

SIZES = {
    "width": "of the hidden states",
    "heads": "of the queries",
    "kv-heads": "of keys and values (default: as many queries' heads share one as before)",
    "ffn": "neurons of the feed-forward",
}


def add(commands: Commands) -> None:
    compress = commands.add_parser(
        "compress",
        help="a model with fewer layers or narrower ones, from a teacher's weights",
        description=(
            "Writes a model of the teacher's family to OUT that keeps some of its layers, and of "
            "its width, heads and feed-forward what counts most: by the size of weights, or, with "
            "--corpus, by what it does on text. The model is to be trained, as by `run`; its "
            "configuration's layer_map says which layers of the teacher it began as."
        ),
        allow_abbrev=False,
    )
    add_folders(
        compress,
        teacher="what `save_pretrained` wrote",
        out="where the student goes",
    )
    compress.add_argument(
        "--layers", metavar="N", help="how many, or every-2, or the indices of those: 0,2,5"
    )
    compress.add_argument(
        "--layer-map",
        default="spread",
        metavar="MAP",
        help="which, where --layers is a number: spread, uniform, first, last or influence"
        " (default: %(default)s)",
    )
    for name, what in SIZES.items():
        add_number(compress, f"--{name}", what)
    compress.add_argument(
        "--method",
        metavar="HOW",
        help="what counts: weight, activation or svd (default: activation with --corpus, weight"
        " without)",
    )
    add_corpus(compress, "text to look at: the files below DIR")
    add_number(compress, "--tokens", "of the text, 512 at a time", 8192, most=1 << 30)
    compress.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    from distill.data.capture import first_tokens, load_teacher, require_finite, save_model
    from distill.data.corpus import load_corpus
    from distill.files import require_place
    from distill.models.compression import compress

    require_place(args.out, args.teacher)
    teacher, tokenizer = load_teacher(args.teacher)
    inputs = None
    if args.corpus is not None:
        corpus = load_corpus(args.corpus, args.pattern, text_key=args.text_key)
        inputs = [ids[None] for ids in first_tokens(corpus, tokenizer, args.tokens).split(512)]
        require_finite(teacher, inputs)
    student, layer_map, _ = compress(
        teacher,
        layers=_layers(args.layers),
        layer_map=args.layer_map,
        width=args.width,
        heads=args.heads,
        kv_heads=args.kv_heads,
        ffn=args.ffn,
        method=args.method,
        inputs=inputs,
    )
    save_model(args.out, student, tokenizer)
    before, after = teacher.num_parameters(), student.num_parameters()
    print(
        f"student  {args.out}: layers {', '.join(map(str, layer_map))} of the teacher's, {after:,}"
        f" of {before:,} parameters ({after / before:.1%})"
    )


def _layers(text: str | None) -> Any:
    if text is None or text.startswith("every-"):
        return text
    try:
        indices = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DistillError(f"--layers: must be as 6, every-2 or 0,2,5, got {text!r}") from error
    return indices if "," in text else indices[0]
