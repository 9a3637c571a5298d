"""One stage of a recipe: steps over all ranks, checkpoints to go on from, and what is logged.

    total = sum over losses of weight(step) * sum / count, both over micro-batches and ranks

Batches and random draws are functions of the step: a run that goes on from a checkpoint makes the
very steps that it would have made.
"""

from __future__ import annotations

import fnmatch
import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data.rows import Batch, Rows
from distill.errors import DistillError, Interrupt, NotFinite
from distill.files import write_atomically
from distill.losses.module import DistillModule
from distill.progress import Meter
from distill.training import parallel, snapshot
from distill.training.recipe import LogConfig, LoopConfig, StageConfig


@dataclass
class Metrics:
    """metrics.jsonl: one JSON object a line, the main process's."""

    path: Path
    accelerator: Accelerator

    def write(self, line: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Forget what a stage wrote after `step`, and a line that a kill has cut short."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if self._stays(line, stage, step)]
            write_atomically(self.path, "".join(kept))

    @staticmethod
    def _stays(line: str, stage: str, step: int) -> bool:
        try:
            found = json.loads(line)
        except ValueError:
            return False
        return line.endswith("\n") and (found["stage"] != stage or found["step"] <= step)


@dataclass
class Stage:
    """Trains what `config.trainable` names of `module`, in place.

    settings: all that decides the weights, so that a checkpoint of other settings is refused.
    heldout: numbers of the student to log along the way, or {}; all ranks call it.
    """

    config: StageConfig
    loop: LoopConfig
    log: LogConfig
    module: DistillModule
    rows: Rows
    accelerator: Accelerator
    folder: Path
    settings: dict[str, Any]
    metrics: Metrics
    heldout: Callable[[parallel.Wrapped], dict[str, float]] = lambda _: {}
    interrupt: Interrupt = field(default_factory=Interrupt)
    step: int = 0
    train_s: float = 0.0
    saved: Path | None = None

    def __post_init__(self) -> None:
        choose_trainable(self.module.student, self.config.trainable, self.config.name)
        ranks = self.accelerator.num_processes
        if self.loop.rows % ranks:
            raise DistillError(
                f"recipe: loop.rows must be a multiple of the {ranks} ranks, got {self.loop.rows}"
            )

    def prepare(self) -> None:
        """Spread the module over the ranks; the optimizer is of what is then there."""
        self.wrapped = parallel.Wrapped(self.module, self.accelerator, self.loop)
        groups = parameter_groups(self.module, self.config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, betas=(self.config.betas[0], self.config.betas[1]), fused=True
        )

    @property
    def steps(self) -> int:
        return self.config.steps_of(self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.rows.rows * self.rows.length

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def _checkpoint_due(self) -> bool:
        every = self.loop.checkpoint_every
        return every > 0 and self.step % every == 0

    def restore(self) -> None:
        """Go on from the last checkpoint, if there is one; one of other settings is refused."""
        found = snapshot.checkpoints(self.folder)
        if not found:
            self.metrics.rewind(self.config.name, -1)
            return
        manifest = snapshot.read_manifest(found[-1], self.settings)
        snapshot.load(found[-1], self.accelerator, self.module, self.optimizer, manifest)
        self.step, self.train_s, self.saved = manifest.step, manifest.train_s, found[-1]
        self.metrics.rewind(self.config.name, self.step)

    def save(self) -> None:
        self._require_finite_weights()
        state = snapshot.training_state(self.module, self.optimizer)
        manifest = snapshot.Manifest(self.settings, self.step, self.train_s, {})
        self.saved = snapshot.save(self.folder, self.accelerator, state, manifest, self.loop.keep)

    def run(self, meter: Meter) -> None:
        """Train up to the last step. A signal to any rank ends the run, with a checkpoint."""
        if self.step == 0 and self.loop.heldout_every:
            self._log_heldout()
        while not self.finished:
            began = time.perf_counter()
            losses, norm, signum = self._train_step()
            took = time.perf_counter() - began
            self.train_s += took
            self.step += 1
            meter.update(self.step, self._total(losses), self.tokens_per_step, losses)
            self._log(losses, norm, took)
            if signum or self.finished or self._checkpoint_due:
                self.save()
            if signum:
                self.interrupt.requested = signum
                self.interrupt.check()

    def _train_step(self) -> tuple[dict[str, float], float, int]:
        """Losses over all rows, the gradient's norm before it is clipped, and a signal or 0."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(hash((self.loop.seed, self.step, rank)) % 2**63)
        weights = {spec.name: spec.weight_at(self.step, self.steps) for spec in self.module.specs}
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.config, self.step, self.steps)
        micro_rows = self.loop.micro_rows or self.loop.rows
        batches = self.rows.micro_batches(self.step, rank, ranks, micro_rows)
        whole = self.rows.sizes(self.step)
        self.wrapped.inside.train()
        self.optimizer.zero_grad()
        values: Any = 0.0
        for at, batch in enumerate(batches, start=1):
            with self.wrapped.sync(gradients=at == len(batches)):
                values = values + self._backward(batch, weights, whole, ranks)
        norm = parallel.clip(self.module, self.config.clip)
        mine = [values, norm.double()[None], values.new_tensor([self.interrupt.requested or 0])]
        every = self.accelerator.reduce(torch.cat(mine), "sum").tolist()  # the one wait of a step
        losses = {name: x / ranks for name, x in zip(weights, every, strict=False)}
        norm_, signum = every[-2] / ranks, every[-1]
        self._require_finite(losses, norm_)
        self.optimizer.step()
        return losses, norm_, self.interrupt.requested or (signal.SIGTERM if signum else 0)

    def _backward(
        self, batch: Batch, weights: Mapping[str, float], whole: Mapping[str, int], ranks: int
    ) -> Tensor:
        """(losses,) float64: a micro-batch's part of each loss, whose gradients are added."""
        sizes = batch.sizes
        batch = batch.to(self.accelerator.device)
        found = self.wrapped(
            batch.input_ids,
            batch.labels,
            cu_seqlens=batch.cu_seqlens,
            words=batch.words,
            positions=batch.positions,
            weights=weights,
        )
        parts = []
        for spec in self.module.specs:
            value, count = found[spec.name]
            tokens = spec.options.get("tokens", "labelled")
            # What a loss counts is a multiple of these tokens, in a micro-batch as in the step: so
            # this divides by the step's count, and by the ranks' as their gradients are averaged.
            # Where it is none (`attention` takes a sample), it weighs the micro-batches' means.
            share = ranks * sizes[tokens] / max(whole[tokens], 1)
            parts.append(value * (share / count.clamp_min(1)))
        self.accelerator.backward(sum(w * x for w, x in zip(weights.values(), parts, strict=True)))
        return torch.stack([x.detach().double() for x in parts])

    def _require_finite(self, losses: Mapping[str, float], norm: float) -> None:
        for name, value in {**losses, "gradient norm": norm}.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{self.config.name}: {name} is {value} at step {self.step + 1} of"
                    f" {self.steps} (lr {lr_at(self.config, self.step, self.steps):.2g}), on"
                    f" {self.rows.describe(self.step)}; {self._kept}"
                )

    def _require_finite_weights(self) -> None:
        """A step of finite losses may still have ruined them; that is no checkpoint."""
        trained = [parallel.local(p) for p in self.module.parameters() if p.requires_grad]
        bad = torch.stack([(~p.isfinite()).any().float() for p in trained]).sum()
        if self.accelerator.reduce(bad, "sum").item():
            raise NotFinite(
                f"{self.config.name}: a weight is not finite after step {self.step} of {self.steps}"
                f" (lr {lr_at(self.config, self.step - 1, self.steps):.2g}); {self._kept}"
            )

    @property
    def _kept(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint"

    def _log(self, losses: dict[str, float], norm: float, took: float) -> None:
        if self.finished or self.step % self.log.every == 0:
            line = {
                "loss": self._total(losses),
                "lr": lr_at(self.config, self.step - 1, self.steps),
                "grad_norm": norm,
                "tokens_per_s": self.tokens_per_step / took,
            }
            self.metrics.write(self._here | line | {"losses": losses})
            self._track(losses | line)
        every = self.loop.heldout_every
        if every and (self.finished or self.step % every == 0):
            self._log_heldout()

    def _log_heldout(self) -> None:
        if found := self.heldout(self.wrapped):
            self.metrics.write(self._here | {"heldout": found})
            self._track({f"heldout/{name}": value for name, value in found.items()})

    @property
    def _here(self) -> dict[str, Any]:
        tokens = self.step * self.tokens_per_step
        return {"stage": self.config.name, "step": self.step, "tokens": tokens}

    def _track(self, values: Mapping[str, Any]) -> None:
        named = {f"{self.config.name}/{name}": value for name, value in values.items()}
        self.accelerator.log(named, step=self.step)

    def _total(self, losses: Mapping[str, float]) -> float:
        return sum(
            spec.weight_at(self.step - 1, self.steps) * losses[spec.name]
            for spec in self.module.specs
        )


def lr_at(config: StageConfig, step: int, steps: int) -> float:
    """Learning rate of the step with this index: a linear rise, then the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr + (config.lr - config.final_lr) * left


def choose_trainable(student: nn.Module, patterns: list[str], stage: str) -> None:
    """Freeze what no pattern matches; one that matches nothing is an error."""
    names = [name for name, _ in student.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise DistillError(
                f"recipe: trainable of stage {stage} must match names such as {names[0]},"
                f" got {pattern!r}"
            )
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, x) for x in patterns))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained. Matrices decay; norms and biases, whatever their shape, do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and not name.endswith("bias")
            (decayed if matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
