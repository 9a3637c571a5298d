"""Training losses of a language model; each is loss(model, inputs_BT, labels_BT) -> scalar."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import xlstm_kernels as xk


@dataclass(frozen=True)
class DistillConfig:
    """Weights of the hard labels and of the teacher, and the temperature of the latter."""

    ce_weight: float
    kl_weight: float
    temperature: float


def hard_labels(model: nn.Module, inputs_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the text, in nats per token."""
    logits_BTV, _ = model(inputs_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


class Distillation:
    """ce_weight * cross-entropy + kl_weight * temperature^2 * KL(teacher | student), per token."""

    def __init__(self, teacher: nn.Module, config: DistillConfig, backend: str = "auto"):
        self.teacher, self.config, self.backend = teacher.eval(), config, backend

    def __call__(
        self, model: nn.Module, inputs_BT: torch.Tensor, labels_BT: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            teacher_BTV, _ = self.teacher(inputs_BT)
        logits_BTV, _ = model(inputs_BT)
        return self.from_logits(logits_BTV, teacher_BTV, labels_BT)

    def from_logits(
        self, logits_BTV: torch.Tensor, teacher_BTV: torch.Tensor, labels_BT: torch.Tensor
    ) -> torch.Tensor:
        """The loss when the teacher's logits are already known."""
        return xk.kl_div(
            logits_BTV.flatten(0, 1),
            teacher_BTV.flatten(0, 1),
            labels_BT.flatten(),
            temperature=self.config.temperature,
            ce_weight=self.config.ce_weight,
            kl_weight=self.config.kl_weight,
            backend=self.backend,
        )
