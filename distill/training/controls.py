"""What a student is to be compared with: recipes that are made from its own.

    hard-labels         the same student by the same stages, steps and rates, from the text alone
    teacher-trained-on  the teacher, trained on by the same stages, from the text alone

Without the first, what a student knows may be the text's and not its teacher's; without the second,
what it gains on its teacher may be further training and nothing else.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distill.errors import DistillError, nearest
from distill.models.merging import Weights
from distill.training.recipe import (
    EvaluationConfig,
    LossConfig,
    Recipe,
    StageConfig,
    StudentConfig,
)


def controls_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of those that it names.

    Raises:
        DistillError: there is no control of a name, or none can be made of this recipe.
    """
    for name in recipe.controls:
        if name not in CONTROLS:
            raise DistillError(
                f"recipe: controls has no {name}{nearest(name, list(CONTROLS))};"
                f" there are {', '.join(CONTROLS)}"
            )
    return {name: CONTROLS[name](recipe) for name in recipe.controls}


def hard_labels(recipe: Recipe) -> Recipe:
    """The student from the weights that it began with, without its teacher's words."""
    return _from_text(recipe, recipe.student, recipe.stages)


def teacher_trained_on(recipe: Recipe) -> Recipe:
    """The teacher in the student's place. A stage takes part with those of its `trainable` that the
    teacher has: one that trains new mixers alone, and so nothing of the teacher, is left out."""
    if recipe.teacher.path is None:
        raise DistillError("recipe: controls: teacher-trained-on must have teacher.path, got none")
    names = Weights(Path(recipe.teacher.path)).files
    stages = []
    for stage in recipe.stages:
        there = [pattern for pattern in stage.trainable if fnmatch.filter(names, pattern)]
        if there:
            stages.append(replace(stage, trainable=there))
    if not stages:
        raise DistillError(
            "recipe: controls: teacher-trained-on must have a stage that trains what the teacher"
            " has, got none"
        )
    return _from_text(recipe, StudentConfig("load", recipe.teacher.path), stages)


CONTROLS: dict[str, Callable[[Recipe], Recipe]] = {
    "hard-labels": hard_labels,
    "teacher-trained-on": teacher_trained_on,
}


def _from_text(recipe: Recipe, student: StudentConfig, stages: list[StageConfig]) -> Recipe:
    """Every loss gives way to cross-entropy, with the arguments that a stage has for it."""
    return replace(
        recipe,
        student=student,
        teacher=replace(recipe.teacher, cache=None),
        stages=[replace(stage, losses=[_cross_entropy(stage)]) for stage in stages],
        evaluation=EvaluationConfig(report=False),
        controls=[],
    )


def _cross_entropy(stage: StageConfig) -> LossConfig:
    own = (loss.args for loss in stage.losses if loss.name == "ce")
    return LossConfig("ce", 1.0, dict(next(own, {})))
