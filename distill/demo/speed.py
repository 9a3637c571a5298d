"""The hybrid's training step on the fused kernels and in plain eager torch: equal, then timed. And
how fast each model reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.capture import load_model
from distill.errors import DistillError
from distill.hybrid.mixer import HybridMixer
from distill.losses.module import DistillModule, LossSpec
from distill.training.recipe import StageConfig
from xlstm_kernels.testing import budget, relative_error

REFERENCE = "reference"


@dataclass(frozen=True)
class Parity:
    """Relative error of the whole gradient (2-norm, against float64) and its budget, that of
    `xlstm_kernels.testing`."""

    error: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.error <= self.budget


class Step:
    """One step of a stage on one backend: both models, losses, gradients, optimizer."""

    def __init__(
        self,
        student: Path,
        teacher: Path,
        stage: StageConfig,
        backend: str,
        dtype: torch.dtype = torch.float32,
    ):
        model = load_model(student, dtype).train()
        for module in model.modules():
            if isinstance(module, HybridMixer):
                module.options = replace(module.options, backend=backend)
        specs = [
            LossSpec(loss.name, loss.weight, {**loss.args, "backend": backend})
            for loss in stage.losses
        ]
        self.weights = {spec.name: spec.weight_at(0, 1) for spec in specs}
        self.losses = DistillModule(model, load_model(teacher, dtype), specs)
        self.optimizer = torch.optim.AdamW(self.losses.parameters(), lr=1e-6, fused=True)

    def gradient(self, input_ids: Tensor) -> Tensor:
        """That of all parameters, as one vector."""
        self._backward(input_ids)
        grads = [parameter.grad for parameter in self.losses.student.parameters()]
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    def timed(self, input_ids: Tensor) -> float:
        """Seconds of forward, losses, backward and optimizer."""
        began = time.perf_counter()
        self._backward(input_ids)
        self.optimizer.step()
        return time.perf_counter() - began

    def _backward(self, input_ids: Tensor) -> None:
        self.optimizer.zero_grad()
        found = self.losses(input_ids, input_ids, weights=self.weights)
        parts = (self.weights[name] * value / count for name, (value, count) in found.items())
        torch.stack(list(parts)).sum().backward()


def compare_backends(
    student: Path,
    teacher: Path,
    stage: StageConfig,
    backend: str,
    input_ids: Tensor,
    repeats: int,
    after_step: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Tokens/s of `backend` and of plain torch, turn by turn, so that whatever else the machine
    does falls on both alike.

    Raises:
        DistillError: the gradient on `backend` is further from the exact one than its budget.
    """
    models = (student, teacher, stage)
    found = parity(*models, backend, input_ids[:2])
    if not found.holds:
        raise DistillError(
            f"speed: backend {backend!r} must agree with {REFERENCE!r} before it is timed: the"
            f" gradient is off by {found.error:.1e}, allowed {found.budget:.1e}"
        )
    steps = {name: Step(*models, name) for name in (backend, REFERENCE)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for at, (name, step) in enumerate(steps.items(), start=1):
            step_s = step.timed(input_ids)
            if repeat:
                seconds[name].append(step_s)
            after_step(repeat * len(steps) + at)
    rates = {name: input_ids.numel() / statistics.median(took) for name, took in seconds.items()}
    return {
        "backend": backend,
        "parity": asdict(found),
        "tokens_per_s": rates,
        "ratio": rates[backend] / rates[REFERENCE],
    }


def parity(
    student: Path, teacher: Path, stage: StageConfig, backend: str, input_ids: Tensor
) -> Parity:
    """How far the gradient on `backend` is from the exact one."""
    models = (student, teacher, stage)
    exact = Step(*models, REFERENCE, torch.float64).gradient(input_ids)
    plain = Step(*models, REFERENCE).gradient(input_ids)
    ours = Step(*models, backend).gradient(input_ids)
    return Parity(relative_error(ours, exact), budget(plain, exact, torch.float32))


@torch.no_grad()
def reading_rates(
    models: Mapping[str, torch.nn.Module], input_ids: Tensor, repeats: int
) -> dict[str, float]:
    """Tokens/s of a forward pass, by model, turn by turn; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(input_ids)
            seconds[name].append(time.perf_counter() - began)
    return {name: input_ids.numel() / statistics.median(took[1:]) for name, took in seconds.items()}
