"""What a model remembers over a long text, and what its mixers listen to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.evaluation.scores import require_positions, words
from distill.hybrid.mixer import HybridMixer
from distill.hybrid.options import HybridOptions

# Nothing in these helps to guess a number.
FILLER = (
    " The river was quiet in the morning.",
    " Two boats lay at the pier.",
    " Nobody had swept the yard.",
    " A dog slept under the table.",
    " The baker opened his shop.",
    " Rain fell on the hills.",
    " The train came late again.",
    " She read a book by the window.",
)
NEEDLE = " The pass key is {key}. Remember it."
QUESTION = " The pass key is"


@torch.no_grad()
def needle(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    depths: int = 5,
    draws: int = 2,
    seed: int = 0,
) -> dict[int, float]:
    """How often a model finds a number of five digits in a text of so many tokens.

    The number stands at `depths` places from the text's beginning to its end, `draws` times each,
    and is asked for at the end. It is found where its every token is the model's first choice.

    Args:
        model: a causal language model of transformers.
        tokenizer: of transformers, or None where ids are bytes.

    Returns:
        The share that is found, by length.
    """
    require_positions("needle", model, max(lengths, default=0))
    require_needles(tokenizer, lengths, depths=depths, draws=draws, seed=seed)
    training, places = model.training, _places(depths, draws, seed)
    model.eval()
    try:
        return {
            length: sum(_found(model, tokenizer, length, *place) for place in places) / len(places)
            for length in lengths
        }
    finally:
        model.train(training)


def require_needles(
    tokenizer: Any, lengths: Sequence[int], *, depths: int = 5, draws: int = 2, seed: int = 0
) -> None:
    """Raises DistillError unless the text that `needle` would ask about fits in each length."""
    for length in lengths:
        for depth, draw in _places(depths, draws, seed):
            _, *parts = _parts(tokenizer, length, depth, draw)
            least = sum(map(len, parts))
            if length < least:
                raise DistillError(
                    f"needle: lengths must be at least {least}, which the question takes, got"
                    f" {length}"
                )


def _places(depths: int, draws: int, seed: int) -> list[tuple[float, str]]:
    """Where numbers stand, 0 the beginning and 1 the end, and what they are drawn with."""
    return [
        (depth / max(1, depths - 1), f"{seed}/{draw}")
        for depth in range(depths)
        for draw in range(draws)
    ]


def _parts(
    tokenizer: Any, length: int, depth: float, seed: str
) -> tuple[random.Random, list[int], list[int], list[int]]:
    """What the filler is drawn with; ids of the needle, the question and the answer."""
    draw = random.Random(f"{seed}/{length}/{depth}")
    key = draw.randrange(10_000, 100_000)
    needle_ids, question, answer = (
        words(tokenizer, x) for x in (NEEDLE.format(key=key), QUESTION, f" {key}")
    )
    return draw, needle_ids, question, answer


def _found(model: Any, tokenizer: Any, length: int, depth: float, seed: str) -> bool:
    draw, needle_ids, question, answer = _parts(tokenizer, length, depth, seed)
    room = length - len(needle_ids) - len(question) - len(answer)
    filler: list[int] = []
    while len(filler) < room:
        filler += words(tokenizer, draw.choice(FILLER))
    at = round(depth * room)
    ids = [*filler[:at], *needle_ids, *filler[at:room], *question, *answer]
    given = torch.tensor([ids[:-1]], device=model.device)
    # Of the answer's tokens alone: all logits of a long text are large.
    hidden = model.base_model(given, use_cache=False)[0][0, -len(answer) :]
    top = model.get_output_embeddings()(hidden).argmax(dim=-1)
    return top.tolist() == answer


@torch.no_grad()
def mean_gates(student: Any, input_ids: Tensor) -> dict[int, list[float]]:
    """The mean of each head's output gate, by layer: 1 is all mLSTM, 0 all window.

    Args:
        student: of `hybridize` or `load_student`; a model without mixers has no gates.
        input_ids: (B, T).
    """
    found: dict[int, list[float]] = {}

    def keep(index: int, *seen: Any) -> None:
        o_BTH1 = seen[-1]
        found[index] = o_BTH1.float().mean((0, 1, 3)).tolist()

    mixers = [module for module in student.modules() if isinstance(module, HybridMixer)]
    if not mixers:
        return found
    config = student.config
    layers = HybridOptions.from_dict(config.hybrid).replaced(config.num_hidden_layers)
    training = student.training
    student.eval()
    try:
        for index, mixer in zip(layers, mixers, strict=True):
            mixer.observer = partial(keep, index)
        student.base_model(input_ids.to(student.device), use_cache=False)
    finally:
        for mixer in mixers:
            mixer.observer = None
        student.train(training)
    return found
