"""`tune`: successive halving over choices of a recipe, within a budget of tokens.

All trials train for a little; the better part of them trains anew for longer; and so on until one
is left. Each round has the same share of the budget, so that the last trains longest. Every trial
is a run of its own whose schedules fit its budget: what counts is how it ends, not how it begins.

Source: Jamieson and Talwalkar, arXiv 1502.07943, section 3.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState

from distill.data.capture import load_teacher
from distill.data.corpus import Halves
from distill.data.tokens import TOKENS
from distill.errors import DistillError, Interrupt, NotFinite
from distill.evaluation.scores import evaluate
from distill.progress import Reporter
from distill.training.recipe import EvaluationConfig, Recipe, StageConfig
from distill.training.runs import run

BEST = "best.yaml"


@dataclass
class Trial:
    """Choices by key, as `stages.1.lr`, and bits per byte of validation text after each round that
    it took part in; NaN where training did not stay finite. test: of the best one, bits per byte of
    the held-out text that chose nothing."""

    choices: dict[str, str]
    scores: list[float] = field(default_factory=list)
    test: float | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """Best last round first."""
        last = self.scores[-1] if self.scores else math.nan
        return -len(self.scores), math.inf if math.isnan(last) else last


@dataclass(frozen=True)
class Round:
    """So many trials, each for so many tokens."""

    trials: int
    tokens: int


def plan(trials: int, tokens: int, keep: int) -> list[Round]:
    """Rounds of `trials`, then of one in `keep` of them, until no more than `keep` are left."""
    counts = [trials]
    while counts[-1] > keep:
        counts.append(math.ceil(counts[-1] / keep))
    return [Round(count, tokens // len(counts) // count) for count in counts]


def choices(over: Mapping[str, Sequence[str]], most: int | None, seed: int) -> list[dict[str, str]]:
    """All combinations of the values of each key, or `most` of them, drawn with `seed`."""
    for key, values in over.items():
        if not values:
            raise DistillError(f"tune: {key} must have a value at least")
    found = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    if most is not None and most < len(found):
        drawn = random.Random(seed).sample(range(len(found)), most)
        found = [found[at] for at in sorted(drawn)]
    if len(found) < 2:
        raise DistillError(f"tune: there must be two combinations to compare, got {len(found)}")
    return found


def tune(
    source: str | Path,
    over: Mapping[str, Sequence[str]],
    folder: Path,
    reporter: Reporter,
    interrupt: Interrupt | None = None,
    *,
    tokens: int,
    overrides: Sequence[str] = (),
    most: int | None = None,
    keep: int = 3,
    seed: int = 1,
    after_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Find which choices of a recipe end with the fewest bits per byte of its validation files.

    Args:
        source, overrides: as of `Recipe.load`. Stages keep their shares of the budget.
        over: values to try by key, as {"stages.0.lr": ["1e-3", "3e-3"]}.
        folder: of all runs, and of best.yaml, the recipe with the best choices and its own budget.
            What is finished there is not trained again.
        tokens: that all trials together train on, at most.
        most: so many combinations are tried, drawn with `seed`; None tries all.
        keep: one trial in so many goes on to the next round.

    Returns:
        All trials, the best first.

    Raises:
        DistillError: a key is unknown, the budget is smaller than a step of each stage, or too few
            files are held out to choose by some and to score the best on others.
        Interrupted: a signal came; the same call goes on.
    """
    if keep < 2:
        raise DistillError(f"tune: keep must be at least 2, got {keep}")
    trials = [Trial(chosen) for chosen in choices(over, most, seed)]
    recipes = [
        Recipe.load(source, [*overrides, *(f"{k}={v}" for k, v in trial.choices.items())])
        for trial in trials
    ]
    texts = {recipe.data.plan() for recipe in recipes}
    halves = {text: text.corpus().halves for text in texts}
    for heldout in halves.values():
        heldout.require_validation("tune")
    left = list(range(len(trials)))
    rounds = plan(len(trials), tokens, keep)
    for number, each in enumerate(rounds):
        shortened = {at: with_budget(recipes[at], each.tokens) for at in left}
        for at in left:
            name = f"trial-{at}"
            score = _score(shortened[at], folder / f"round-{number}" / name, reporter, interrupt)
            trials[at].scores.append(score)
            after_trial(trials[at])
        following = rounds[number + 1].trials if number + 1 < len(rounds) else 1
        left = sorted(left, key=lambda at: trials[at].rank)[:following]
    if math.isinf(trials[left[0]].rank[1]):
        raise DistillError("tune: no trial stayed finite; try lower learning rates")
    best = left[0]
    recipes[best].save(folder / BEST)
    student = folder / f"round-{len(rounds) - 1}" / f"trial-{best}" / "student"
    trials[best].test = _test(recipes[best], student, halves[recipes[best].data.plan()])
    return sorted(trials, key=lambda trial: trial.rank)


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with stages that train on `tokens` in all, in the shares that they had."""
    each = recipe.loop.rows * recipe.data.length
    whole = [stage.tokens or each * (stage.steps or 0) for stage in recipe.stages]
    factor = tokens / sum(whole)
    if any(factor * size < each for size in whole):
        least = math.ceil(each * sum(whole) / min(whole))
        raise DistillError(
            f"tune: a trial must train on {least:,} tokens at least, a step of each stage, got"
            f" {tokens:,}; raise tokens, or try fewer combinations"
        )
    return replace(recipe, stages=[_shorter(stage, factor, each) for stage in recipe.stages])


def _shorter(stage: StageConfig, factor: float, each: int) -> StageConfig:
    steps = stage.steps or (stage.tokens or 0) / each
    fewer = max(1, int(factor * steps))
    return replace(stage, steps=fewer, tokens=None, warmup=int(stage.warmup * fewer / steps))


def _test(recipe: Recipe, student: Path, heldout: Halves) -> float:
    model, tokenizer = load_teacher(student, torch.float32)
    model.to(PartialState().device)
    return evaluate(model, tokenizer, heldout.test, length=recipe.data.length).bits_per_byte


def _score(recipe: Recipe, folder: Path, reporter: Reporter, interrupt: Interrupt | None) -> float:
    """Bits per byte at the end of a run, which is made unless it has been."""
    # Validation files are read at the end alone.
    longest = max(stage.steps or 0 for stage in recipe.stages)
    recipe = replace(
        recipe,
        loop=replace(recipe.loop, heldout_every=longest + 1),
        data=replace(recipe.data, tokens=recipe.data.tokens or str(folder.parents[1] / TOKENS)),
        evaluation=EvaluationConfig(report=False),
        controls=[],
    )
    if not (folder / "student").exists():
        try:
            run(recipe, folder, reporter, interrupt, resume=True)
        except NotFinite as error:
            reporter.say(f"  {error}")
            return math.nan
    elif Recipe.load(folder / "recipe.yaml") != recipe:
        raise DistillError(f"tune: {folder} is of another recipe; choose another folder")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if '"heldout"' in line]
    return float(found[-1]["heldout"]["bits_per_byte"])
