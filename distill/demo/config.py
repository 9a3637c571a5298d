"""The demo's sizes and budgets: everything that decides its result, in one value."""

from dataclasses import dataclass, replace

from distill.demo.losses import DistillConfig
from distill.demo.model import ModelConfig
from distill.demo.trainer import StageConfig

# A tokenizer of a small corpus may end up smaller; the vocabulary is filled in once it is known.
UNKNOWN_VOCAB = 0


@dataclass(frozen=True)
class DemoConfig:
    """One demo: `student_stage` is also the budget of the control."""

    teacher: ModelConfig
    student: ModelConfig
    teacher_stage: StageConfig
    student_stage: StageConfig
    distill: DistillConfig
    vocab_size: int
    rows: int
    length: int
    heldout_bytes: int
    probe_tokens: int
    speed_rows: int
    speed_repeats: int
    sample_tokens: int
    seed: int = 1


STANDARD = DemoConfig(
    teacher=ModelConfig(UNKNOWN_VOCAB, width=256, layers=2, heads=4, ffn=512),
    student=ModelConfig(UNKNOWN_VOCAB, width=128, layers=2, heads=4, ffn=256),
    teacher_stage=StageConfig(steps=900, lr=6e-3),
    student_stage=StageConfig(steps=500, lr=1e-2),
    distill=DistillConfig(ce_weight=0.2, kl_weight=0.8, temperature=1.0),
    vocab_size=4096,
    rows=8,
    length=128,
    heldout_bytes=200_000,
    probe_tokens=4096,
    speed_rows=8,
    speed_repeats=5,
    sample_tokens=72,
)

# For continuous integration: the same path in seconds, with numbers that mean nothing.
QUICK = replace(
    STANDARD,
    teacher=ModelConfig(UNKNOWN_VOCAB, width=64, layers=2, heads=2, ffn=128),
    student=ModelConfig(UNKNOWN_VOCAB, width=32, layers=1, heads=2, ffn=64),
    teacher_stage=StageConfig(steps=60, lr=1e-2, warmup=5, probe_every=20, checkpoint_every=20),
    student_stage=StageConfig(steps=30, lr=1e-2, warmup=5, probe_every=10, checkpoint_every=10),
    vocab_size=512,
    rows=8,
    length=64,
    heldout_bytes=20_000,
    probe_tokens=1024,
    speed_rows=2,
    speed_repeats=2,
    sample_tokens=24,
)


def demo_config(quick: bool, steps_scale: float, seed: int, backend: str) -> DemoConfig:
    """A preset with the user's choices applied."""
    config = QUICK if quick else STANDARD
    return replace(
        config,
        teacher=replace(config.teacher, backend=backend),
        student=replace(config.student, backend=backend),
        teacher_stage=_scaled(config.teacher_stage, steps_scale),
        student_stage=_scaled(config.student_stage, steps_scale),
        seed=seed,
    )


def _scaled(stage: StageConfig, factor: float) -> StageConfig:
    return replace(stage, steps=max(1, round(stage.steps * factor)))
