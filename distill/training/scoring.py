"""What follows the last stage: a finished run's scores and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.data.corpus import Halves
from distill.errors import DistillError, Interrupt
from distill.evaluation.assessment import Plan, assess
from distill.evaluation.folders import Models
from distill.report.document import HTML, MARKDOWN, publish, write_report
from distill.report.run_folder import SCORES, control_students
from distill.training.recipe import Recipe

OUTCOME = (SCORES, HTML, MARKDOWN)


def plan_of(recipe: Recipe) -> Plan:
    chosen = recipe.evaluation
    return Plan(
        recipe.data.length, chosen.rows, needle_lengths=chosen.needle, contexts=chosen.contexts
    )


def score(
    recipe: Recipe,
    folder: Path,
    heldout: Halves,
    device: Any,
    say: Callable[[str], None],
    interrupt: Interrupt,
) -> None:
    """Write scores.json and the report of a run whose student is there; without a teacher, the
    report of its training alone."""
    if recipe.teacher.path is None:
        write_report(folder)
        say(f"report   {folder / HTML}, without scores: the recipe has no teacher")
        return
    folders = {"teacher": Path(recipe.teacher.path), "student": folder / "student"}

    def say_next(message: str) -> None:
        interrupt.check()
        say(message)

    try:
        models = Models(folders | control_students(folder), device)
        scores = assess(
            models,
            models.tokenizer,
            heldout.test,
            plan_of(recipe),
            validation=heldout.validation,
            say=say_next,
            after_batch=lambda done, total: interrupt.check(),
        )
    except torch.OutOfMemoryError as error:
        raise DistillError(
            f"report: {device} has no room for teacher and student: {folder / 'student'} is whole,"
            f" `distill eval --out {folder}` scores it where there is room"
        ) from error
    publish(folder, scores, say)


def forget(folder: Path) -> None:
    """Remove what was said of weights that are about to change."""
    for name in OUTCOME:
        (folder / name).unlink(missing_ok=True)


def is_scored(folder: Path) -> bool:
    return all((folder / name).exists() for name in (HTML, MARKDOWN))
