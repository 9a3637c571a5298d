"""One stage of training: a fixed number of steps, a checkpoint to continue from, a history."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from distill.checkpoint import Checkpoint, restore_model, restore_training, training_tensors
from distill.corpus import Batches
from distill.demo.model import LanguageModel
from distill.errors import DistillError, Interrupt
from distill.progress import Meter

# loss(model, inputs_BT, labels_BT) -> scalar
Loss = Callable[[LanguageModel, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StageConfig:
    """Budget and schedule: linear warm-up, then a cosine from `lr` down to `lr * final_lr`."""

    steps: int
    lr: float
    warmup: int = 20
    final_lr: float = 0.02
    weight_decay: float = 0.05
    clip: float = 1.0
    log_every: int = 10
    probe_every: int = 50
    checkpoint_every: int = 100

    def lr_at(self, step: int) -> float:
        """Learning rate of the step with this index."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        )


@dataclass
class Stage:
    """Trains `model` in place.

    `settings` is everything that decides the weights, so that a checkpoint of other settings is
    refused.  `probe(model)` returns held-out numbers to log along the way, or {}.
    """

    name: str
    config: StageConfig
    model: LanguageModel
    loss: Loss
    batches: Batches
    path: Path
    settings: dict
    seed: int
    probe: Callable[[LanguageModel], dict[str, float]] = lambda model: {}
    interrupt: Interrupt = field(default_factory=Interrupt)
    step: int = 0
    train_s: float = 0.0
    history: list[dict] = field(default_factory=list)
    saved_step: int | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, self.config.weight_decay), betas=(0.9, 0.98), fused=True
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batches.rows * self.batches.length

    @property
    def tokens_per_s(self) -> float:
        return self.step * self.tokens_per_step / self.train_s if self.train_s else 0.0

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def restore(self) -> None:
        """Continue from the checkpoint at `path`; one of other settings is refused."""
        checkpoint = Checkpoint.load(self.path)
        if difference := checkpoint.difference(self.settings):
            raise DistillError(
                f"{self.name}: {self.path} was trained with other settings ({difference})"
            )
        if checkpoint.step >= self.config.steps:
            restore_model(checkpoint.tensors, self.model)
        else:
            restore_training(checkpoint.tensors, self.model, self.optimizer)
        self.step, self.train_s = checkpoint.step, checkpoint.train_s
        self.history = checkpoint.history
        self.saved_step = checkpoint.step

    def save(self) -> None:
        tensors = training_tensors(self.model, self.optimizer)
        Checkpoint(self.settings, self.step, self.train_s, self.history, tensors).save(self.path)
        self.saved_step = self.step

    def run(self, meter: Meter) -> None:
        """Train up to the last step.

        A signal ends the run after the step it arrives in, with a checkpoint on disk.
        """
        if self.step == 0:
            # For layers that draw at random; a resumed run takes the generator from its checkpoint.
            torch.manual_seed(self.seed)
        while not self.finished:
            began = time.perf_counter()
            loss = self._train_step()
            self.train_s += time.perf_counter() - began
            self.step += 1
            self._log(loss)
            meter.update(self.step, loss, self.tokens_per_step)
            stop = self.interrupt.requested is not None
            if stop or self.finished or self.step % self.config.checkpoint_every == 0:
                self.save()
            self.interrupt.check()

    def _train_step(self) -> float:
        self.model.train()
        inputs_BT, labels_BT = self.batches.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.optimizer.zero_grad()
        loss = self.loss(self.model, inputs_BT, labels_BT)
        self._require_finite("loss", loss)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._require_finite("gradient norm", norm)
        self.optimizer.step()
        return loss.item()

    def _require_finite(self, what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            kept = (
                "there is no checkpoint yet"
                if self.saved_step is None
                else f"the last good checkpoint is {self.path} of step {self.saved_step}"
            )
            raise DistillError(
                f"{self.name}: {what} is {value.item()} at step {self.step + 1} of "
                f"{self.config.steps} (lr {self.config.lr_at(self.step):.2g}); {kept}"
            )

    def _log(self, loss: float) -> None:
        probed = self.finished or self.step % self.config.probe_every == 0
        if probed or self.step % self.config.log_every == 0:
            point = {"step": self.step, "loss": loss}
            self.history.append(point | (self.probe(self.model) if probed else {}))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms and biases, whatever their shape, do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith("bias")
        (decayed if is_matrix else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
