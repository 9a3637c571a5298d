"""The student's loss is the one the report names."""

import pytest
import torch

from distill.demo.losses import Distillation, DistillConfig, hard_labels
from distill.demo.model import ModelConfig, seeded_model

STUDENT = ModelConfig(vocab=40, width=16, layers=1, heads=2, ffn=16)
TEACHER = ModelConfig(vocab=40, width=32, layers=1, heads=2, ffn=16)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_cross_entropy_and_divergence(backend, temperature):
    config = DistillConfig(ce_weight=0.3, kl_weight=0.7, temperature=temperature)
    student = seeded_model(STUDENT, 0).double()
    teacher = seeded_model(TEACHER, 1).double()
    inputs_BT, labels_BT = torch.randint(40, (2, 2, 5))
    loss = Distillation(teacher, config, backend)(student, inputs_BT, labels_BT)
    loss.backward()
    got = student.embedding.weight.grad.clone()
    student.zero_grad()

    with torch.no_grad():
        p_NV = (teacher(inputs_BT)[0] / temperature).softmax(-1).flatten(0, 1)
    logits_NV = student(inputs_BT)[0].flatten(0, 1)
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    divergence = (p_NV * (p_NV.log() - log_q_NV)).sum(-1).mean()
    want = 0.3 * hard_labels(student, inputs_BT, labels_BT) + 0.7 * temperature**2 * divergence
    torch.testing.assert_close(loss, want)
    want.backward()
    torch.testing.assert_close(got, student.embedding.weight.grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())
