"""Training losses of a language model; each is loss(model, inputs_BT, labels_BT) -> scalar."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import xlstm_kernels as xk
from distill.demo.model import LanguageModel


@dataclass(frozen=True)
class DistillConfig:
    """Weights of the hard labels and of the teacher, and the temperature of the latter."""

    ce_weight: float
    kl_weight: float
    temperature: float


def hard_labels(
    model: LanguageModel, inputs_BT: torch.Tensor, labels_BT: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy with the text, in nats per token."""
    logits_BTV, _ = model(inputs_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def distillation(
    logits_BTV: torch.Tensor,
    teacher_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    config: DistillConfig,
    backend: str = "auto",
) -> torch.Tensor:
    """ce_weight * cross-entropy + kl_weight * temperature^2 * KL(teacher | student), in nats.

    The gradient is written over `logits_BTV`.
    """
    return xk.kl_div(
        logits_BTV.flatten(0, 1),
        teacher_BTV.flatten(0, 1),
        labels_BT.flatten(),
        temperature=config.temperature,
        ce_weight=config.ce_weight,
        kl_weight=config.kl_weight,
        # The logits are used for nothing else, and a fresh gradient of their size is not free.
        inplace_grad=True,
        backend=backend,
    )


@dataclass(frozen=True)
class Distillation:
    """`distillation` from a teacher that runs beside the student."""

    teacher: LanguageModel
    config: DistillConfig
    backend: str = "auto"

    def __call__(
        self, model: LanguageModel, inputs_BT: torch.Tensor, labels_BT: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            teacher_BTV, _ = self.teacher.eval()(inputs_BT)
        logits_BTV, _ = model(inputs_BT)
        return distillation(logits_BTV, teacher_BTV, labels_BT, self.config, self.backend)
