"""The same training step on the fused kernels and on plain eager torch: equal first, then timed."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill.demo.losses import DistillConfig, distillation
from distill.demo.model import LanguageModel, ModelConfig
from xlstm_kernels.testing import budget, relative_error

# inputs_BT, labels_BT, teacher_BTV
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepTiming:
    """Seconds of each repetition of one training step of `tokens` tokens."""

    backend: str
    tokens: int
    step_s: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.step_s)


@dataclass(frozen=True)
class Parity:
    """Largest relative gradient error (2-norm, against float64) and its budget.

    The budget is that of `xlstm_kernels.testing`.
    """

    parameter: str
    error: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.error <= self.budget


class Step:
    """One distillation step of a copy of the student on one backend; teacher logits are given."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        distill: DistillConfig,
        backend: str,
        dtype: torch.dtype = torch.float32,
    ):
        self.model = LanguageModel(dataclasses.replace(config, backend=backend)).to(dtype)
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.distill, self.backend, self.dtype = distill, backend, dtype

    def gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        self._backward(batch)
        gradients = {}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad
        return gradients

    def timed(self, batch: Batch) -> float:
        """Seconds of forward, loss, backward and optimizer."""
        began = time.perf_counter()
        self._backward(batch)
        self.optimizer.step()
        return time.perf_counter() - began

    def _backward(self, batch: Batch) -> None:
        inputs_BT, labels_BT, teacher_BTV = batch
        self.optimizer.zero_grad()
        logits_BTV, _ = self.model(inputs_BT)
        teacher_BTV = teacher_BTV.to(self.dtype)
        distillation(logits_BTV, teacher_BTV, labels_BT, self.distill, self.backend).backward()


def parity(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    distill: DistillConfig,
    backend: str,
    batch: Batch,
) -> Parity:
    """The worst parameter's gradient error of `backend` beside its budget."""
    exact = Step(config, weights, distill, "reference", torch.float64).gradients(batch)
    plain = Step(config, weights, distill, "reference").gradients(batch)
    ours = Step(config, weights, distill, backend).gradients(batch)
    results = [
        Parity(name, relative_error(ours[name], want), budget(plain[name], want, torch.float32))
        for name, want in exact.items()
    ]
    return max(results, key=lambda result: result.error / result.budget)


def time_steps(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    distill: DistillConfig,
    backends: tuple[str, ...],
    batch: Batch,
    repeats: int,
    after_step: Callable[[int], None] = lambda done: None,
) -> list[StepTiming]:
    """Time one step per backend in turn, `repeats` times after a warm-up of each.

    Turn by turn, so that whatever else the machine does falls on all of them alike.
    """
    steps = [Step(config, weights, distill, backend) for backend in backends]
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    done = 0
    for repeat in range(repeats + 1):
        for step in steps:
            step_s = step.timed(batch)
            if repeat > 0:
                seconds[step.backend].append(step_s)
            done += 1
            after_step(done)
    return [StepTiming(b, batch[0].numel(), tuple(seconds[b])) for b in backends]
