"""Fair comparisons, honest failures."""

import pytest
import torch

from distill.checkpoint import Checkpoint
from distill.demo.config import QUICK, STANDARD
from distill.demo.model import ModelConfig, n_parameters, seeded_model
from distill.demo.run import require_small
from distill.demo.trainer import Stage, StageConfig
from distill.errors import DistillError


def test_student_and_control_differ_in_their_loss_alone(make_demo, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    starts = {}
    original = Stage._train_step

    def step(self):
        if self.step == 0:
            starts[self.name] = [p.detach().clone() for p in self.model.parameters()]
        seen.setdefault(self.name, []).extend(self.batches.batch(self.step))
        return original(self)

    monkeypatch.setattr(Stage, "_train_step", step)
    demo = make_demo(tmp_path)
    demo.train()
    student, control = demo.stages["student"], demo.stages["control"]
    assert len(seen["student"]) == len(seen["control"]) == 2 * student.config.steps
    assert all(map(torch.equal, seen["student"], seen["control"]))
    assert all(map(torch.equal, starts["student"], starts["control"]))
    assert student.config == control.config
    ends = [stage.model.embedding.weight for stage in (student, control)]
    assert not torch.equal(*ends)


def test_the_teacher_is_not_trained_by_its_student(make_demo, tmp_path):
    demo = make_demo(tmp_path)
    demo.train()
    on_disk = Checkpoint.load(demo.stages["teacher"].path).tensors
    for name, tensor in demo.stages["teacher"].model.state_dict().items():
        assert torch.equal(tensor, on_disk[f"model.{name}"]), name


@pytest.mark.parametrize("preset", [STANDARD, QUICK], ids=["standard", "quick"])
def test_presets_keep_the_student_small(preset):
    teacher, student = (
        seeded_model(ModelConfig(**{**vars(sizes), "vocab": preset.vocab_size + 1}), 0)
        for sizes in (preset.teacher, preset.student)
    )
    assert n_parameters(student) <= 0.4 * n_parameters(teacher)


def test_large_student_is_refused():
    sizes = ModelConfig(vocab=50, width=16, layers=1, heads=2, ffn=16)
    model = seeded_model(sizes, 0)
    with pytest.raises(DistillError, match="at most 40% of the teacher's parameters, got 100%"):
        require_small(model, model)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_non_finite_numbers_stop_and_keep_the_last_good_checkpoint(
    make_demo, tmp_path, monkeypatch, what
):
    original = Stage._train_step

    def step(self):
        if self.name == "student" and self.step == 5:
            if what == "loss":
                self.loss = lambda model, *batch: model.embedding.weight.sum() * float("nan")
            else:
                # the square root's slope at zero
                self.loss = lambda model, *batch: (model.embedding.weight.sum() * 0).sqrt()
        return original(self)

    monkeypatch.setattr(Stage, "_train_step", step)
    with pytest.raises(DistillError) as error:
        make_demo(tmp_path).train()
    assert f"student: {what} is nan at step 6 of 6" in str(error.value)
    path = tmp_path / "checkpoints" / "student.safetensors"
    assert f"the last good checkpoint is {path} of step 4" in str(error.value)
    assert Checkpoint.load(path).step == 4


def test_learning_rate_warms_up_and_decays():
    config = StageConfig(steps=100, lr=1.0, warmup=10, final_lr=0.1)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_initial_weights_depend_on_the_seed_alone():
    sizes = ModelConfig(vocab=50, width=16, layers=1, heads=2, ffn=16)
    torch.manual_seed(1)
    first = seeded_model(sizes, 5).state_dict()
    torch.manual_seed(2)
    drawn = torch.rand(3)
    second = seeded_model(sizes, 5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(2)
    assert torch.equal(drawn, torch.rand(3))
