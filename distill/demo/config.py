"""The demo's sizes and budgets, and the recipes that they make: all that decides its result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.training.controls import hard_labels, teacher_trained_on
from distill.training.recipe import (
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LoopConfig,
    LossConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)


@dataclass(frozen=True)
class Sizes:
    """Of the teacher, a Llama over bytes."""

    width: int = 160
    layers: int = 4
    heads: int = 5
    ffn: int = 448


@dataclass(frozen=True)
class Budget:
    """Training steps of each part, and the learning rates."""

    teacher: int = 650
    align: int = 40
    distill: int = 50
    small: int = 80
    teacher_lr: float = 4e-3
    align_lr: float = 1e-2
    distill_lr: float = 5e-4
    small_lr: float = 3e-3


@dataclass(frozen=True)
class DemoConfig:
    """One demo. `small_layers` are left of the teacher's in the small student; `contexts` are
    those after which `sequences` are timed; `seeds` decide the order of the text."""

    corpus: Path
    pattern: str = "*.py"
    sizes: Sizes = Sizes()
    budget: Budget = Budget()
    seeds: tuple[int, ...] = (1, 2, 3)
    rows: int = 8
    length: int = 256
    window: int = 32
    sinks: int = 4
    small_layers: int = 2
    ce_weight: float = 0.1
    kl_weight: float = 0.9
    heldout_bytes: int = 50_000
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    sequences: int = 16
    speed_repeats: int = 5
    sample_tokens: int = 120
    backend: str = "cpu"


QUICK: dict[str, Any] = {
    "sizes": Sizes(width=32, layers=2, heads=2, ffn=64),
    "budget": Budget(teacher=20, align=4, distill=6, small=8),
    "length": 64,
    "window": 16,
    "small_layers": 1,
    "heldout_bytes": 4_000,
    "contexts": (64, 256),
    "speed_repeats": 1,
    "sample_tokens": 16,
}


def demo_config(
    corpus: Path, pattern: str, quick: bool, steps_scale: float, seed: int, backend: str
) -> DemoConfig:
    """The user's choices; `quick` is the same path in seconds, with numbers that mean nothing."""
    config = DemoConfig(corpus, pattern, backend=backend, seeds=(seed, seed + 1, seed + 2))
    config = replace(config, **QUICK) if quick else config
    budget, parts = config.budget, ("teacher", "align", "distill", "small")
    steps = {name: max(1, round(getattr(budget, name) * steps_scale)) for name in parts}
    return replace(config, budget=replace(budget, **steps))


class Recipes:
    """What the demo trains from the teacher in a folder, and that one from random weights."""

    def __init__(self, config: DemoConfig, teacher: Path):
        self.config, self.teacher = config, teacher

    def of_teacher(self, start: Path) -> Recipe:
        budget = self.config.budget
        stage = self._stage("train", budget.teacher, budget.teacher_lr, [self._ce()])
        return self._recipe([stage], 0, StudentConfig("load", str(start)), None)

    def hybrid(self, seed: int) -> Recipe:
        config, budget = self.config, self.config.budget
        options = {"window": config.window, "sinks": config.sinks, "backend": config.backend}
        student = StudentConfig("hybridize", options=options, calibration_rows=4)
        errors = LossConfig("mixer_mse", 1.0, {"relative": True})
        align = self._stage("align", budget.align, budget.align_lr, [errors])
        align.trainable = ["*mixer*"]
        distill = self._stage("distill", budget.distill, budget.distill_lr, self._distillation())
        return self._recipe([align, distill], seed, student, self.teacher)

    def trained_on(self, seed: int) -> Recipe:
        """The teacher itself, for the steps of the hybrid's second stage."""
        return teacher_trained_on(self.hybrid(seed))

    def small(self, seed: int) -> Recipe:
        """A few of the teacher's layers."""
        budget = self.config.budget
        stage = self._stage("distill", budget.small, budget.small_lr, self._distillation())
        student = StudentConfig("compress", options={"layers": self.config.small_layers})
        return self._recipe([stage], seed, student, self.teacher)

    def small_from_labels(self, seed: int) -> Recipe:
        return hard_labels(self.small(seed))

    def _ce(self, weight: float = 1.0) -> LossConfig:
        return LossConfig("ce", weight, {"backend": self.config.backend})

    def _distillation(self) -> list[LossConfig]:
        config = self.config
        kl = LossConfig("kl", config.kl_weight, {"backend": config.backend})
        return [self._ce(config.ce_weight), kl]

    def _stage(self, name: str, steps: int, lr: float, losses: list[LossConfig]) -> StageConfig:
        rise = max(1, min(20, steps // 8))
        stage = StageConfig(name, losses, steps=steps, lr=lr, final_lr=lr / 20, warmup=rise)
        stage.betas = [0.9, 0.98]
        return stage

    def _recipe(
        self, stages: list[StageConfig], seed: int, student: StudentConfig, teacher: Path | None
    ) -> Recipe:
        config = self.config
        data = DataConfig(str(config.corpus), config.pattern, config.length)
        data.heldout_bytes = config.heldout_bytes
        loop = LoopConfig(config.rows, seed=seed, checkpoint_every=50, heldout_every=0)
        path = None if teacher is None else str(teacher)
        recipe = Recipe(student, TeacherConfig(path), data, stages, loop, LogConfig([]))
        recipe.evaluation = EvaluationConfig(report=False)  # the demo's own compares all of them
        recipe.check()
        return recipe
